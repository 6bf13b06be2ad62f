"""docs/launch.md and its files: they parse, and what they name exists."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docs" / "launch").iterdir())
PAGE = (ROOT / "docs" / "launch.md").read_text()
TEXTS = [PAGE, *(path.read_text() for path in FILES)]


@pytest.mark.parametrize("path", [f for f in FILES if f.suffix in (".sh", ".sbatch")], ids=str)
def test_shell_files_parse(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_skypilot_task_parses(tmp_path):
    task = yaml.safe_load((ROOT / "docs" / "launch" / "skypilot.yaml").read_text())
    assert task["num_nodes"] > 1 and {"resources", "envs"} <= task.keys()
    for part in ("setup", "run"):
        script = tmp_path / part
        script.write_text(task[part])
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_page_names_every_file():
    assert {path.name for path in FILES} == set(re.findall(r"\]\(launch/([\w.]+)\)", PAGE))


def test_what_the_commands_name_exists():
    everything = "\n".join(TEXTS)
    for module, name in set(re.findall(r"configs/(\w+)\.py:(\w+)", everything)):
        importlib.import_module(f"configs.{module}").get_config(name)
    for module in set(re.findall(r"python -m ([\w.]+)", everything)):
        assert importlib.util.find_spec(module), module
    launcher = (ROOT / "train.py").read_text() + (
        ROOT / "meteor_jax" / "distributed.py"
    ).read_text()
    for flag in ("coordinator", "num_processes", "process_id", "config", "workdir"):
        assert f'"{flag}"' in launcher and f"--{flag}=" in everything
