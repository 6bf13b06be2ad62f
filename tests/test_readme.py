"""The README's commands, on a run of a few steps."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
SHORT = (
    "--config.train.pretrain.steps=2 --config.train.finetune.steps=2 --config.train.log_every=1 "
    "--config.train.finetune.batch_size=4 --config.train.pretrain.batch_size=4 "
    "--config.eval.num_questions=8 --config.train.finetune.plans=\"('meteor',)\""
)


def run(command: str, *, cwd: Path, extra: str = "") -> str:
    words = shlex.split(command + " " + extra)
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder that sees the project, with runs/tiny trained by the README's first command."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("train.py", "evaluate.py", "configs", "meteor_jax"):
        (folder / name).symlink_to(ROOT / name)
    install, train = COMMANDS[0].split(" && ")
    assert install == "pip install -r requirements.txt"
    run(train, cwd=folder, extra=SHORT)
    return folder


def test_training_leaves_what_the_readme_says(workspace):
    folder = workspace / "runs/tiny"
    for name in ("eval.json", "metrics.jsonl", "accuracy_vs_tokens.png", "kept_tokens.png"):
        assert (folder / name).stat().st_size > 0
    plans = {path.stem for path in (folder / "predictions").rglob("*.jsonl")}
    assert plans >= {"full", "meteor", "random"}


@pytest.mark.parametrize(
    ("word", "extra", "expected"),
    [
        ("evaluate.py", "--num_questions=8", "meteor"),
        ("tools.calibrate", "", "meteor"),
        ("models.cost", "", "meteor"),
        ("tools.sweep_prune_layers", "--num_images=4", "by chance"),
    ],
)
def test_the_other_commands_run(workspace, word, extra, expected):
    (command,) = (line for line in COMMANDS if word in line)
    assert expected in run(command, cwd=workspace, extra=extra)


def test_the_study_runs(workspace):
    (encoders,) = (line for line in COMMANDS if "tools.pretrain_encoders" in line)
    (train,) = (line for line in COMMANDS if "train.py --config=configs/small.py" in line)
    said = run(encoders, cwd=workspace, extra="--steps=2 --num_images=32")
    assert "pix2struct sees" in said
    few = '--config.data.num_images="(32, 32)" --config.eval.num_images=16'
    run(train, cwd=workspace, extra=f"{SHORT} {few}")
    rows = json.loads((workspace / "runs/small/eval.json").read_text())["rows"]
    assert {"reading_digits", "easyvqa_yesno"} <= {row["task"] for row in rows}


def test_every_command_is_known_to_this_test():
    known = (
        "pip install",
        "train.py",
        "evaluate.py",
        "tools.calibrate",
        "models.cost",
        "tools.pretrain_encoders",
        "tools.sweep_prune_layers",
    )
    assert all(any(word in command for word in known) for command in COMMANDS)


def test_the_public_names_exist():
    import meteor_jax

    (line,) = re.findall(r"from meteor_jax import (.*)", README)
    for name in [*line.split(", "), *meteor_jax.__all__]:
        assert getattr(meteor_jax, name)
