"""One process of a tiny run on two: `… -m tests.training.one_of_many WORKDIR PORT ID MESH EVENT`.

MESH is the sizes of its axes, as in 8,1,1. EVENT is "none", or "kill:STEP" or "term:STEP": the
signal that process 1 gets as that step begins.
"""

import os
import signal
import sys
import time

from meteor_jax.parallel.distributed import start_processes
from meteor_jax.parallel.mesh import AXES
from tests.training import tiny_run

NUM_PROCESSES = 2
HEARTBEAT_SECONDS = 6
NUM_STEPS = (6, 34)  # of the two stages


def make_experiment(*mesh):
    """On a mesh of these sizes."""
    pretrain, finetune = NUM_STEPS
    return tiny_run.make_whole_experiment(
        pretrain={"steps": pretrain},
        finetune={"steps": finetune},
        mesh=dict(zip(AXES, mesh, strict=True)),
    )


def open_data(stage, *, first_batch, shard, event="none", step=None):
    """The tiny run's data; after SIGTERM slowly, for the notice takes a second to go round."""
    batches = tiny_run.batches(stage, first_batch=first_batch, shard=shard)
    for number, batch in enumerate(batches, stage.start + first_batch):
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL if event == "kill" else signal.SIGTERM)
        if step is not None and number > step:
            time.sleep(0.1)
        yield batch


def main(workdir, port, process_id, mesh, event):
    start_processes(
        coordinator=f"localhost:{port}",
        num_processes=NUM_PROCESSES,
        process_id=int(process_id),
        heartbeat_seconds=HEARTBEAT_SECONDS,
        enable_preemption=True,
    )
    name, _, step = event.partition(":")
    options = {"event": name, "step": int(step)} if step and process_id == "1" else {}
    result = tiny_run.run(
        workdir,
        make_experiment(*map(int, mesh.split(","))),
        devices=None,
        data=tiny_run.Data(batches=lambda stage, **where: open_data(stage, **where, **options)),
    )
    return 0 if result.signal is None else 128 + result.signal


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
