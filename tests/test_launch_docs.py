"""docs/launch.md and its files: they parse, and what they name exists."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from meteor_jax.cli.__main__ import main
from meteor_jax.experiment.config import load_experiment
from meteor_jax.parallel.mesh import make_mesh
from tests.fake_devices import fake_slices

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


def flags_of_xpk(tmp_path, *, slices):
    """train.py's flags, as xpk.sh hands them to the workload of so many slices."""
    shown = tmp_path / "xpk"
    shown.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    shown.chmod(0o755)
    names = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "IMAGE": "i", "SLICES": str(slices)}
    done = subprocess.run(
        ["bash", str(ROOT / "docs/launch/xpk.sh"), "train"],
        capture_output=True,
        text=True,
        check=True,
        env=names | {"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert f"--num-slices={slices}" in done.stdout.splitlines()
    return re.findall(r"--config[\w.]*=\S+", done.stdout)


@pytest.mark.parametrize("slices", [1, 2])
def test_xpk_trains_on_as_many_slices_as_it_asks_for(tmp_path, monkeypatch, slices):
    given = (flag.replace("/app/", f"{ROOT}/") for flag in flags_of_xpk(tmp_path, slices=slices))
    monkeypatch.setattr(sys, "argv", ["train.py", *given])  # which config_flags reads
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    values(sys.argv)
    experiment = load_experiment(config.value)
    try:
        mesh = make_mesh(experiment.train.mesh, devices=fake_slices(slices))
    except Exception as error:
        mesh = f"{type(error).__name__}: {str(error)[:200]}"
    assert isinstance(mesh, Mesh), mesh
    assert dict(mesh.shape) == {"data": slices, "fsdp": 64, "tensor": 1}
    for rows, part in zip(mesh.devices, range(slices), strict=True):
        assert {device.slice_index for device in rows.flat} == {part}
    for stage in experiment.train.stages():
        assert stage.config.batch_size % mesh.size == 0


def test_what_the_commands_name_exists(capsys):
    everything = "\n".join(TEXTS)
    for module, name in set(re.findall(r"configs/(\w+)\.py:(\w+)", everything)):
        importlib.import_module(f"configs.{module}").get_config(name)
    for module in set(re.findall(r"python -m ([\w.]+)", everything)):
        assert importlib.util.find_spec(module), module
    assert main(["train", "--help"]) == 0
    defined = capsys.readouterr().out
    for flag in ("coordinator", "num_processes", "process_id", "config", "workdir"):
        assert f"  --{flag}=VALUE" in defined and f"--{flag}=" in everything
