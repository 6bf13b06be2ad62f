"""The commands of the README and of its guides, on a run of a few steps."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.documents import README, ROOT, commands

pytestmark = pytest.mark.long

GUIDES = (README, ROOT / "docs/training.md", ROOT / "docs/pruning.md")
SHORT = (
    "--config.train.pretrain.steps=2",
    "--config.train.finetune.steps=2",
    "--config.train.log_every=1",
    "--config.train.finetune.batch_size=4",
    "--config.train.pretrain.batch_size=4",
    "--config.eval.num_questions=8",
    "--config.train.finetune.plans=('meteor',)",
)


def find(*parts: str) -> list[str]:
    """The first command of the guides with all of these words in it."""
    return next(words for words in commands(*GUIDES) if all(part in words for part in parts))


def run(words, *, cwd, extra=()):
    program = {"python": [], "meteor": ["-m", "meteor_jax.cli"]}[words[0]]
    done = subprocess.run(
        [sys.executable, *program, *words[1:], *extra],
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
    first = re.search(r"```bash\n(.*)\n```", README.read_text())[1]
    assert first.startswith("pip install -r requirements.txt && python train.py ")
    run(commands(README)[0], cwd=folder, extra=SHORT)
    return folder


def test_training_leaves_what_the_readme_says(workspace):
    folder = workspace / "runs/tiny"
    for name in ("eval.json", "metrics.jsonl", "accuracy_vs_tokens.png", "kept_tokens.png"):
        assert (folder / name).stat().st_size > 0
    plans = {path.stem for path in (folder / "predictions").rglob("*.jsonl")}
    assert plans >= {"full", "meteor", "random"}


@pytest.mark.parametrize(
    ("words", "extra", "expected"),
    [
        (("evaluate.py", "--checkpoint=runs/tiny"), ("--num_questions=8",), "mean % over tasks"),
        (("evaluate.py", "--tasks=all"), ("--num_questions=8",), "fastv"),
        (("calibrate",), (), "meteor"),
        (("flops",), (), "meteor"),
        (("sweep-layers",), ("--num_images=4",), "random"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and value else None,
)
def test_the_other_commands_run(workspace, words, extra, expected):
    assert expected in run(find(*words), cwd=workspace, extra=extra)


def test_the_python_example_runs(workspace):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    said = run(["python", "-c", example], cwd=workspace)
    assert said.startswith("full: ") and "\nmeteor: " in said


def test_the_study_runs(workspace):
    said = run(find("pretrain-encoders"), cwd=workspace, extra=("--steps=2", "--num_images=32"))
    assert "pix2struct sees" in said
    few = ("--config.data.num_images=(32, 32)", "--config.eval.num_images=16")
    run(find("train.py", "--config=configs/small.py"), cwd=workspace, extra=(*SHORT, *few))
    rows = json.loads((workspace / "runs/small/eval.json").read_text())["rows"]
    assert {"reading_digits", "easyvqa_yesno"} <= {row["task"] for row in rows}


def test_the_public_names_exist():
    import meteor_jax

    for name in meteor_jax.__all__:
        assert getattr(meteor_jax, name)
