import jax
import numpy as np
import pytest

from meteor_jax.checkpoint import CheckpointError
from meteor_jax.experiment.config import load_experiment
from meteor_jax.inference.load import load_params, read_experiment, source_folder
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from tests.evaluation.random_model import config, make_params, save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, config("data"))
    return folder


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=2))


def test_a_run_has_its_config_with_it(run):
    assert read_experiment(run) == load_experiment(config("data"))


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
