"""The commands: each has its file, its help and an example; the overview loads nothing heavy."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import meteor_jax.cli
from meteor_jax.cli.__main__ import COMMANDS, main

FOLDER = Path(meteor_jax.cli.__file__).parent


def test_every_file_is_a_command_or_serves_them():
    files = {path.stem.replace("_", "-") for path in FOLDER.glob("[!_]*.py")}
    assert files - {"run", "flags"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_flags_and_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: meteor {name}")
    examples = re.findall(rf"^    meteor {name} (.*)", said, flags=re.MULTILINE)
    assert examples
    defined = set(re.findall(r"^  --(?:\[no\])?(\w+)", said, flags=re.MULTILINE))
    used = {flag for example in examples for flag in re.findall(r"--(?:no)?(\w+)", example)}
    assert used <= defined
    assert all(len(line) <= 100 for line in said.splitlines())


def test_the_overview_lists_all_commands(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", said, flags=re.MULTILINE) for name in COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["evalute", "--checkpoint=x"]) == 2
    assert capsys.readouterr().err == "error: no command 'evalute'. Did you mean 'evaluate'?\n"


@pytest.mark.parametrize(
    "program",
    [
        "import meteor_jax",
        "from meteor_jax.cli.__main__ import main; assert main(['--help']) == 0",
        "from meteor_jax.cli.__main__ import main; assert main(['--version']) == 0",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(program):
    heavy = "{'jax', 'flax', 'numpy', 'transformers', 'torch', 'tensorflow_datasets'}"
    check = f"{program}; import sys; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


@pytest.mark.parametrize("launcher", ["train", "evaluate"])
def test_the_launchers_are_commands(launcher, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{launcher}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER.parents[1] / f"{launcher}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: meteor {launcher}")
