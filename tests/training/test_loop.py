"""The loop from outside: what it writes, how it ends, and that it resumes to the same numbers."""

import dataclasses
import gzip
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from meteor_jax.config import ConfigError
from meteor_jax.parallel.distributed import DataShard
from meteor_jax.training.logging.metrics import cut_lines
from meteor_jax.training.logging.recorder import TrainingFailed
from tests.training import tiny_run
from tests.training.tiny_run import make_experiment, make_whole_experiment, read_steps, run

ROOT = Path(__file__).parents[2]


def start(workdir, *arguments):
    command = [sys.executable, "-m", "tests.training.tiny_run", str(workdir), *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    tiny_run.main(workdir)
    return read_steps(workdir)


def test_every_step_is_written(uninterrupted):
    assert [line["step"] for line in uninterrupted] == list(range(8))
    assert [line["stage"] for line in uninterrupted] == ["pretrain"] * 4 + ["finetune"] * 4
    assert {line["plan"] for line in uninterrupted[4:]} == {"pruned"}
    assert uninterrupted[5]["fused_share/clip"] == pytest.approx(2 / 3)
    assert len({line["loss"] for line in uninterrupted}) == 8


def test_held_out_loss_is_of_its_own_batches(tmp_path, uninterrupted):
    """Measured every three steps and at the end of each stage, under each plan."""
    names = {"pretrain": "held_out/loss/full", "finetune": "held_out/loss/pruned"}
    found = {
        line["step"]: line[names[line["stage"]]]
        for line in uninterrupted
        if any(name in line for name in names.values())
    }
    assert list(found) == [2, 3, 5, 7]
    experiment = make_experiment(
        pretrain={"steps": 1, "learning_rate": 0.0}, finetune={"steps": 0}, held_out_every=1
    )
    first = tiny_run.held_out(experiment.train.stages()[0], shard=DataShard())[0]
    run(
        tmp_path,
        experiment,
        data=tiny_run.Data(
            batches=lambda stage, **_: itertools.repeat(first),
            held_out=lambda stage, **_: [first, first],
        ),
    )
    [line] = read_steps(tmp_path)
    assert line["held_out/loss/full"] == pytest.approx(line["loss"], rel=1e-6)


def test_profile_traces_the_steps_asked_for(tmp_path):
    run(tmp_path, make_experiment(finetune={"steps": 0}), profile=range(1, 3))
    [trace] = (tmp_path / "profile").rglob("*.trace.json.gz")
    names = gzip.decompress(trace.read_bytes()).decode()
    assert [step for step in range(4) if f'"step_num":"{step}"' in names] == [1, 2]


def test_killed_run_resumes_to_the_same_losses(tmp_path, uninterrupted):
    for step in (3, 7):
        assert start(tmp_path, step).returncode == -signal.SIGKILL
        assert len(read_steps(tmp_path)) < 8
    tiny_run.main(tmp_path)
    assert read_steps(tmp_path) == uninterrupted


def test_signal_saves_and_the_run_goes_on(tmp_path, uninterrupted):
    def calibrate(params):
        os.kill(os.getpid(), signal.SIGTERM)
        return tiny_run.Calibration(ranks={"energy 0.99": tiny_run.RANKS})

    result = run(tmp_path, make_whole_experiment(checkpoint_every=0), calibrate=calibrate)
    assert result.signal == signal.SIGTERM
    assert int(result.state.step) == 4
    assert (tmp_path / "checkpoints" / "4").is_dir()
    tiny_run.main(tmp_path)
    assert read_steps(tmp_path) == uninterrupted


def test_signal_ends_an_evaluation_at_once(tmp_path):
    reached = []

    def evaluate(params, *, step, final):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(step)
        return {}

    result = run(tmp_path, make_experiment(eval_every=3), evaluate=evaluate)
    assert (result.signal, int(result.state.step), reached) == (signal.SIGINT, 3, [])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_stage_added_to_a_finished_run_begins_as_it_would_have(tmp_path, uninterrupted):
    """With its own optimizer, schedule and ranks, not with what the first stage ended with."""
    whole = make_whole_experiment()
    first = make_whole_experiment(finetune={"steps": 0})
    run(tmp_path, first, config=dataclasses.asdict(first))
    run(tmp_path, whole, config=dataclasses.asdict(whole))
    assert read_steps(tmp_path) == uninterrupted


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    experiment = make_experiment()
    run(tmp_path, experiment, config=dataclasses.asdict(experiment))
    before = read_steps(tmp_path)
    other = make_experiment(finetune={"batch_size": 16, "steps": 8})
    with pytest.raises(ConfigError, match="batch_size: checkpoint 8, config 16"):
        run(tmp_path, other, config=dataclasses.asdict(other))
    assert read_steps(tmp_path) == before


def test_a_run_in_which_nothing_fits_ends_and_says_so(tmp_path):
    skipped = tiny_run.make_batch(0)
    skipped = dataclasses.replace(
        skipped,
        example_id=np.full_like(skipped.example_id, -1),
        labels=np.full_like(skipped.labels, tiny_run.IGNORE_LABEL),
    )
    with pytest.raises(TrainingFailed, match="64 examples, up to step 7, were all skipped"):
        run(
            tmp_path,
            make_experiment(pretrain={"steps": 20}),
            data=tiny_run.Data(batches=lambda stage, **_: itertools.repeat(skipped)),
        )


def test_finished_run_only_evaluates(tmp_path):
    experiment, seen = make_experiment(eval_every=4), []

    def evaluate(params, *, step, final):
        seen.append((step, final))
        return {"score": 1.0}

    run(tmp_path, experiment, evaluate=evaluate)
    assert seen == [(4, False), (8, True)]
    before = read_steps(tmp_path)
    run(tmp_path, experiment, evaluate=evaluate)
    assert seen == [(4, False), (8, True), (8, True)]
    assert read_steps(tmp_path) == before


def test_nan_stops_with_step_and_examples(tmp_path):
    experiment = make_experiment(pretrain={"learning_rate": float("inf")})
    with pytest.raises(TrainingFailed, match=r"loss is nan at step 1, .*examples \d+, ") as error:
        run(tmp_path, experiment)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert [line["step"] for line in read_steps(tmp_path)] == [0]


def test_init_from_gives_parameters_only(tmp_path):
    first = run(tmp_path / "first", make_experiment()).state
    experiment = make_experiment(pretrain={"steps": 1, "learning_rate": 0.0}, finetune={"steps": 0})
    experiment = dataclasses.replace(experiment, init_from=(str(tmp_path / "first"),))
    second = run(tmp_path / "second", experiment).state
    assert int(second.step) == 1
    jax.tree.map(np.testing.assert_array_equal, second.params, first.params)


def test_restart_takes_back_what_the_stage_before_taught(tmp_path):
    fresh = run(
        tmp_path / "fresh", make_experiment(pretrain={"steps": 0}, finetune={"learning_rate": 0.0})
    ).state.params
    captions = run(
        tmp_path / "captions", make_experiment(ema_decay=0.5, finetune={"steps": 0})
    ).state
    both = run(
        tmp_path / "both",
        make_experiment(
            ema_decay=0.5, finetune={"steps": 1, "learning_rate": 0.0, "reinit": ("^llama/head",)}
        ),
    ).state
    equal = np.testing.assert_array_equal
    jax.tree.map(equal, both.params["clip"], captions.params["clip"])
    jax.tree.map(equal, both.params["llama"]["embedding"], captions.params["llama"]["embedding"])
    for params in (both.params, both.ema):
        jax.tree.map(equal, params["llama"]["head"], fresh["llama"]["head"])
    assert np.any(captions.params["llama"]["head"]["kernel"] != fresh["llama"]["head"]["kernel"])


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (make_experiment(finetune={"plans": ("ful",)}), "no plan 'ful'.* 'full'"),
        (make_experiment(finetune={"trainable": ("lamma",)}), "finetune.trainable: 'lamma' match"),
        (make_experiment(finetune={"reinit": ("lamma",)}), "finetune.reinit: 'lamma' matches no"),
        (
            make_experiment(finetune={"lr_multipliers": (("clap", 0.1),)}),
            "lr_multipliers: 'clap' matches no parameter; they begin with clip, llama",
        ),
        (make_experiment(finetune={"calibrate_before": False}), "plan 'pruned': no feature ranks"),
        (
            make_experiment(plans={"pruned": "meteor(encode=(6, 5, 4), fuse=9)"}),
            "train.finetune: plan 'pruned': a budget of 9 tokens, but there are 4",
        ),
        (make_experiment(mesh={"data": 3}), "data=3.* does not fit 1 devices"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(tmp_path, experiment, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(tmp_path, experiment)
    assert "\n" not in str(error.value)
    assert not read_steps_if_any(tmp_path)


def read_steps_if_any(workdir):
    return read_steps(workdir) if (workdir / "metrics.jsonl").exists() else []


def test_checkpoint_of_another_config(tmp_path):
    run(tmp_path, make_experiment())
    wider = tiny_run.TinyFamily(width=12)
    message = r"params/clip/fc1/bias: checkpoint \(8,\), config \(12,\); .* and \d+ more\. Use the"
    with pytest.raises(ConfigError, match=message) as error:
        run(tmp_path, make_experiment(), model=wider)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"opt_state/1/mu/llama.*, config has none"):
        run(tmp_path, make_experiment(finetune={"trainable": ("clip",)}))


def test_torn_line_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    cut_lines(path, first_step=2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
