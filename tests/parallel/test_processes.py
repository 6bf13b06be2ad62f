"""Two real processes of four devices each: what one notices all notice, and no step is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.training import one_of_many, tiny_run
from tests.training.one_of_many import HEARTBEAT_SECONDS, NUM_PROCESSES, NUM_STEPS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
TERM_AT, KILL_AT = 8, 25


def start_together(workdir, event, *, mesh="8,1,1"):
    """Runs both processes to their ends: exit codes, standard errors, seconds that 0 outlived 1."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    # Process 0 alone would find programs there, and give up waiting while 1 still compiles.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.training.one_of_many",
                str(workdir),
                str(port),
                str(i),
                mesh,
                event,
            ],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for i in range(NUM_PROCESSES)
    ]
    try:
        errors, ended = {}, {}
        for i in (1, 0):
            errors[i] = running[i].communicate(timeout=240)[1]
            ended[i] = time.monotonic()
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], errors, ended[0] - ended[1]


def newest_checkpoint(workdir):
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return max(int(name) for name in names if name.isdigit())  # the others were never finished


def assert_same_rows(rows, expected):
    """Equal, numbers to 1e-5 of each other: sums run in another order on another mesh."""
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            if isinstance(value, float):
                np.testing.assert_allclose(row[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
            else:
                assert row[name] == value, name


def run_alone(workdir, *mesh):
    tiny_run.run(workdir, one_of_many.make_experiment(*mesh), devices=None)
    return tiny_run.read_steps(workdir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The rows of a run on one process."""
    return run_alone(tmp_path_factory.mktemp("undisturbed"), 8, 1, 1)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A workdir after SIGTERM to process 1."""
    workdir = tmp_path_factory.mktemp("two")
    codes, errors, _ = start_together(workdir, f"term:{TERM_AT}")
    assert codes == [128 + signal.SIGTERM] * NUM_PROCESSES, errors
    return workdir, errors


@pytest.fixture(scope="module")
def killed(stopped):
    """That run gone on with, after SIGKILL to process 1."""
    workdir, _ = stopped
    before = newest_checkpoint(workdir), tiny_run.read_steps(workdir)
    codes, errors, seconds = start_together(workdir, f"kill:{KILL_AT}")
    return workdir, before, codes, errors, seconds


def test_notice_to_one_process_stops_both_at_the_same_saved_step(killed, stopped, undisturbed):
    _, (step, rows), *_ = killed
    assert TERM_AT < step < KILL_AT
    assert [row["step"] for row in rows] == list(range(step))
    assert_same_rows(rows, undisturbed[:step])
    assert f"stopped by SIGTERM after step {step} of {sum(NUM_STEPS)}" in stopped[1][0]
    assert "stopped by" not in stopped[1][1]  # one process speaks for all


def test_killed_process_ends_the_other_in_bounded_time(killed):
    _, _, codes, errors, seconds = killed
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    assert seconds < 5 * HEARTBEAT_SECONDS
    assert "another task died" in errors[0] or "see whether another one was lost" in errors[0]


def test_checkpoint_of_two_processes_goes_on_in_one_on_another_mesh(killed, tmp_path, undisturbed):
    workdir = shutil.copytree(killed[0], tmp_path / "alone")
    assert newest_checkpoint(workdir) > killed[1][0]
    assert_same_rows(run_alone(workdir, 1, 4, 2), undisturbed)


def test_processes_that_share_every_row_go_on_to_the_same_losses(killed, tmp_path, undisturbed):
    workdir = shutil.copytree(killed[0], tmp_path / "together")
    codes, errors, _ = start_together(workdir, "none", mesh="1,1,8")
    assert codes == [0, 0], errors
    assert_same_rows(tiny_run.read_steps(workdir), undisturbed)
    assert newest_checkpoint(workdir) == sum(NUM_STEPS)
    assert json.loads((workdir / "config.json").read_text()) == {"written by": "a test"}
