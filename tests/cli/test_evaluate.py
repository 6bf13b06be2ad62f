"""`meteor evaluate` as it starts an evaluation: what it restores, and onto which devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meteor_jax.cli import evaluate
from meteor_jax.cli.__main__ import main
from meteor_jax.experiment.config import load_experiment
from meteor_jax.inference.load import load_params
from meteor_jax.models.eagle.model import Meteor
from meteor_jax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh
from meteor_jax.perf.traffic import read_traffic
from meteor_jax.pruning.plan import PrunePlan
from tests.evaluation.random_model import config, save_run

ROWS, VOCAB = 8, 264


def values():
    """A bfloat16 model that is trained with its parameters split over all devices."""
    base = config("data")
    llama = base["model"]["llama"] | {
        "width": 256,
        "num_heads": 8,
        "num_kv_heads": 8,
        "mlp_dim": 512,
        "vocab_size": VOCAB,
    }
    model = base["model"] | {"encoder_order": ("clip",), "llama": llama, "dtype": "bfloat16"}
    train = base["train"] | {"mesh": {"data": 1, "fsdp": -1}}
    return base | {"model": model, "train": train}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder; training saves float32."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, values())
    return folder


def test_matrices_are_restored_in_the_dtype_of_the_computation(run):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices=jax.devices()[:8])
    params, _ = load_params(load_experiment(values()), run, mesh=mesh)
    block = params["llama"]["blocks"]["stack"]
    found = {name: block[name]["kernel"].dtype for name in ("query", "out", "gate", "down")}
    found |= {"embedding": params["llama"]["embedding"]["embedding"].dtype}
    assert set(found.values()) == {jnp.dtype("bfloat16")}, found
    assert block["attention_norm"]["scale"].dtype == "float32"


@pytest.fixture
def started(run, monkeypatch):
    """The parameters that `meteor evaluate` evaluates, and the mesh that it puts in force."""
    found = []

    def evaluate_checkpoint(experiment, params, **_):
        found.extend((params, jax.sharding.get_mesh()))
        return []

    monkeypatch.setattr(evaluate, "evaluate_checkpoint", evaluate_checkpoint)
    monkeypatch.setattr(evaluate, "show_results", lambda rows, *, workdir: None)
    assert main(["evaluate", f"--checkpoint={run}", "--num_processes=1"]) == 0
    return found


def extend_as_text(params, mesh):
    """The compiled program of one more token for each of `ROWS` rows."""
    model = Meteor(load_experiment(values()).model)

    def by_rows(shape, dtype, *, axis=0):
        spec = PartitionSpec(*(None,) * axis, BATCH_AXES)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def prefill(params, images, image_valid, tokens, text_valid):
        variables, plan = {"params": params}, PrunePlan()
        visual = model.apply(variables, images, plan=plan, method="encode_images").tokens
        return model.apply(
            variables,
            jax.tree.map(lambda x: x[:, None], visual),
            image_valid=image_valid,
            tokens=tokens,
            text_valid=text_valid,
            plan=plan,
            max_new_tokens=4,
            method="prefill",
        ).cache

    def extend(params, cache, tokens):
        return model.apply({"params": params}, cache, tokens, method="extend")

    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    text = jax.ShapeDtypeStruct((ROWS, 8), jnp.int32), jax.ShapeDtypeStruct((ROWS, 8), jnp.bool_)
    images = jax.ShapeDtypeStruct((ROWS, 32, 32, 3), jnp.uint8)
    valid = jax.ShapeDtypeStruct((ROWS, 1), jnp.bool_)
    cache = jax.tree.map(
        lambda x: by_rows(x.shape, x.dtype, axis=int(x.ndim == 5)) if x.ndim else x,
        jax.eval_shape(prefill, like, images, valid, *text),
    )
    tokens = by_rows((ROWS, 1), jnp.int32)
    with jax.set_mesh(mesh):
        return jax.jit(extend).lower(params, cache, tokens).compile().as_text()


def test_a_decoded_token_gathers_no_parameter(started):
    params, mesh = started
    assert mesh.size == jax.device_count() == 8
    moved = read_traffic(extend_as_text(params, mesh)).collectives
    gathered = moved["all-gather"].result_bytes if "all-gather" in moved else 0
    assert gathered <= 4 * ROWS * VOCAB, f"{gathered:,.0f} bytes gathered: {moved}"
