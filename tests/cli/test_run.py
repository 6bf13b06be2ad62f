"""What a command line means, and how a wrong one is answered: one line, exit code 2."""

import signal
import types

import pytest
from absl import flags, logging

from meteor_jax.cli.flags import define_calibration, define_config, define_plans, read_calibration
from meteor_jax.cli.run import run
from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import load_experiment

CONFIG = """
from ml_collections import ConfigDict
from meteor_jax.experiment.config import complete
def get_config():
    return complete(ConfigDict({
        "model": {}, "data": {"sources": ("easy-vqa",)}, "train": {"finetune": {"steps": 5}},
    }))
"""


def command(main, *, define=define_config):
    return types.SimpleNamespace(__doc__="Does it.", define_flags=define, main=main)


def steps(options):
    print(load_experiment(options.config).train.finetune.steps)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


def refused(capsys, *arguments, main=steps, define=define_config):
    assert run(command(main, define=define), arguments, name="meteor it") == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and not printed.out
    return line


def test_a_field_of_the_config_is_set(config, capsys):
    arguments = [f"--config={config}", "--config.train.finetune.steps=7"]
    assert run(command(steps), arguments, name="meteor it") == 0
    assert capsys.readouterr().out == "7\n"


def test_a_command_leaves_no_signal_handler_behind(config):
    def main(options):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    before = signal.getsignal(signal.SIGTERM)
    assert run(command(main), [f"--config={config}"], name="meteor it") == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_wrong_command_lines(config, capsys):
    found = [
        refused(capsys, f"--config={config}", argument)
        for argument in ("--config.train.finetune.stepz=7", "--config.train.finetune.steps=many")
    ]
    found += [refused(capsys, *given) for given in (["--config=confg.py"], ["--confgi=x"], [])]
    assert found[0] == "error: config: no such field 'stepz'. Did you mean 'steps'?"
    assert "invalid literal for int() with base 10: 'many'" in found[1]
    assert found[2] == "error: config file confg.py does not exist."
    assert found[3] == "error: no flag --confgi. Did you mean --config?"
    assert found[4] == "error: expected --config; --help shows an example."
    assert "'tiny'; flags start with --" in refused(capsys, f"--config={config}", "tiny")


def test_what_a_command_raises_is_one_line(config, capsys):
    def main(options):
        raise ConfigError("expected\n  a, got b.")

    assert refused(capsys, f"--config={config}", main=main) == "error: expected a, got b."
    assert run(command(main), [f"--config={config}", "--verbosity=1"], name="meteor it") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(config):
    def main(options):
        raise TypeError("ours")

    with pytest.raises(TypeError):
        run(command(main), [f"--config={config}"], name="meteor it")


def test_flags_and_verbosity_end_with_the_command(config, capsys):
    before, verbosity = set(flags.FLAGS), logging.get_verbosity()
    for arguments in ([f"--config={config}", "--config.seed=3"], ["--config=absent.py"]):
        run(command(steps), arguments, name="meteor it")
        assert set(flags.FLAGS) == before and logging.get_verbosity() == verbosity


def test_a_calibration_that_is_not_there_is_an_error(tmp_path, capsys):
    absent = tmp_path / "calibration.json"
    line = refused(
        capsys, f"--calibration={absent}", main=read_calibration, define=define_calibration
    )
    assert line.startswith(f"error: --calibration: there is no file {absent}")


def test_help_says_what_is_required_and_what_is_taken_otherwise(capsys):
    def define():
        define_config()
        define_plans("full,meteor")

    assert run(command(steps, define=define), ["--help"], name="meteor it") == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: meteor it --FLAG=VALUE …\n\nDoes it.\n")
    assert "such as configs/tiny.py. Required." in said and "Default: full,meteor." in said
