"""train.py as its users start it: what is wrong is said at once, and a killed run goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.tiny_run import read_steps

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
SHORT = (
    "--config.train.pretrain.steps=2 --config.train.finetune.steps=4 --config.train.log_every=1 "
    "--config.train.finetune.batch_size=4 --config.train.pretrain.batch_size=4 "
    "--config.train.checkpoint_every=1 --config.eval.num_questions=1 "
    "--config.train.finetune.plans=\"('meteor',)\" --config.eval.plans=\"('full',)\""
)


def start(workdir: Path, flags: str = "") -> subprocess.Popen:
    command = f"train.py --config=configs/tiny.py --workdir={workdir} {SHORT} {flags}"
    return subprocess.Popen(
        [sys.executable, *shlex.split(command)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )


def refused(workdir: Path, flags: str) -> str:
    """The line with which it ends."""
    run = start(workdir, flags)
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 2, errors[-3000:]
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    return line


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end."""
    workdir = tmp_path_factory.mktemp("train") / "whole"
    run = start(workdir)
    _, errors = run.communicate(timeout=900)
    assert run.returncode == 0, errors[-3000:]
    return workdir


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--config.train.pretrain.template=qs", "train.pretrain: template: no such template"),
        ("--config.data.tasks=\"('captioning',)\"", "train.finetune: tasks: no source is for"),
        ("--config.data.image_size=96", "the model does not take the data: expected images of 64"),
        ("--config.model.encoders.clip.remat=nothing", "clip.remat: expected 'none' or a name"),
        ("--config.eval.plans=\"('random(fuse.keep=999)',)\"", "fuse.keep=999 but only 116"),
        ("--config.eval.plans=\"('fastv(layer=9,keep=4)',)\"", "must be within 1..3"),
        (
            "--config.data.text_length=4 "
            "--config.train.finetune.plans=\"('meteor(decode=None)',)\"",
            "nothing to calibrate with",
        ),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(tmp_path, flags, expected):
    assert expected in refused(tmp_path / "run", flags)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_killed_run_goes_on_to_the_same_losses(tmp_path, whole):
    run = start(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    for _ in range(3000):  # killed in the second stage, wherever that finds it
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 4:
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    assert len(read_steps(tmp_path)) < 6
    again = start(tmp_path)
    _, errors = again.communicate(timeout=900)
    assert again.returncode == 0 and "resumed at step" in errors, errors[-3000:]
    assert read_steps(tmp_path) == read_steps(whole)
    rows = [json.loads((path / "eval.json").read_text())["rows"] for path in (tmp_path, whole)]
    assert [row["score"] for row in rows[0]] == [row["score"] for row in rows[1]]


def test_a_finished_run_does_not_go_on_as_another_model(whole):
    flags = "--config.model.llama.num_heads=2 --config.model.llama.num_kv_heads=2"
    assert "model.llama.num_heads: checkpoint 4, config 2" in refused(whole, flags)
