import doctest
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from meteor_jax.checkpoint import CheckpointError
from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import load_experiment
from meteor_jax.inference.engine.engine import Engine
from meteor_jax.inference.load import load_engine, load_params, read_experiment, source_folder
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from tests.evaluation.random_model import config, make_params, png, save_run

VALUES = config("data", plans={"meteor": "fastv(layer=1, keep=6)"})
EXAMPLES = {
    "docstring": "".join(
        example.source for example in doctest.DocTestParser().get_examples(Engine.__doc__)
    ),
    "docs/evaluate.md": re.search(
        r"```python\n(.*?load_engine.*?)```",
        (Path(__file__).parents[2] / "docs/evaluate.md").read_text(),
        re.DOTALL,
    )[1],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "runs/tiny"
    save_run(folder, VALUES)
    return folder


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=2))


def test_a_run_has_its_config_with_it(run):
    assert read_experiment(run) == load_experiment(VALUES)


@pytest.mark.parametrize("place", EXAMPLES)
def test_the_example_of_an_engine_runs(run, place, monkeypatch, capsys):
    monkeypatch.chdir(run.parents[1])
    Path("photo.png").write_bytes(png(3))
    exec(EXAMPLES[place], {})
    full, meteor, streamed = capsys.readouterr().out.split("\n")
    assert full == f"full {streamed} ()" and streamed
    assert meteor.startswith("meteor ") and meteor.endswith(" (6,)")


def test_an_engine_of_a_run_names_what_is_wrong(run):
    with pytest.raises(ConfigError, match=r"plan 'fastv': .*within 1\.\.1"):
        load_engine(run, plans="fastv(layer=2, keep=4)")
    with pytest.raises(ConfigError, match="template 'plain' drops the question"):
        load_engine(run, template="plain")
    for plans in ("blind", "blind,majority", ""):
        with pytest.raises(ConfigError, match=f"plans: '{plans}' names no plan"):
            load_engine(run, plans=plans)


def test_a_config_file_with_an_argument(run, tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        "from tests.evaluation.random_model import config\n\n\n"
        "def get_config(name='none'):\n    return config(name)\n"
    )
    assert read_experiment(run, config=f"{path}:here").data.data_dir == "here"
    assert read_experiment(run, config=str(path)).data.data_dir == "none"
    with pytest.raises(CheckpointError, match=r"other\.py does not exist"):
        read_experiment(run, config=str(tmp_path / "other.py"))


def test_parameters_of_a_step(run, mesh):
    experiment = read_experiment(run)
    for step in (None, 7):
        params, found = load_params(experiment, run, mesh=mesh, step=step)
        assert found == 7
        jax.tree.map(np.testing.assert_array_equal, params, make_params(experiment))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 8 in .*; there are 7\."):
        load_params(experiment, run, mesh=mesh, step=8)


def test_parameters_out_of_other_folders(run, mesh, tmp_path):
    experiment = load_experiment(config("data", init_from=(str(run),)))
    assert source_folder(experiment, run) == (run, ())
    folder, init_from = source_folder(experiment, tmp_path)
    assert (folder, init_from) == (run, (str(run),))
    params, step = load_params(experiment, folder, mesh=mesh, init_from=init_from)
    assert step is None
    jax.tree.map(np.testing.assert_array_equal, params, make_params(experiment))
    with pytest.raises(CheckpointError, match="init_from takes the newest"):
        load_params(experiment, folder, mesh=mesh, step=7, init_from=init_from)


def test_a_folder_without_a_config_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="give the config") as caught:
        read_experiment(tmp_path)
    assert "\n" not in str(caught.value)
