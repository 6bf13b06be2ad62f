"""Where inference holds a model: the mesh, the dtype, and what a decoded token moves there."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import load_experiment
from meteor_jax.inference import layout
from meteor_jax.models.eagle.family import Eagle
from meteor_jax.parallel.chips import CHIPS, GIB
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.parallel.rules import parameter_shardings
from meteor_jax.perf.programs import Request, build_program, tracing_for
from meteor_jax.perf.traffic import read_traffic
from tests.evaluation.random_model import config
from tests.fake_devices import fake_slices

ROWS, WIDTH, DEPTH = 8, 256, 3


def make_experiment(*, num_kv_heads=8, dtype="bfloat16", ema=0.0, **evaluation):
    """A decoder that divides by eight, trained with its parameters over all devices."""
    values = config("data")
    llama = values["model"]["llama"] | {
        "depth": DEPTH,
        "width": WIDTH,
        "num_heads": 8,
        "num_kv_heads": num_kv_heads,
        "mlp_dim": 512,
        "vocab_size": 512,
        "max_positions": 128,
    }
    values["model"] |= {"encoder_order": ("clip",), "llama": llama, "dtype": dtype}
    values["train"] |= {"mesh": {"data": 1, "fsdp": -1}, "ema_decay": ema}
    values["data"]["text_length"] = 12
    return load_experiment(values | {"eval": {"max_new_tokens": 4} | evaluation})


def moved_by_a_token(experiment):
    """The collectives of one `extend` of evaluation, by kind."""
    mesh = layout.inference_mesh(experiment, devices=jax.devices()[:8])
    request = Request("extend", experiment, plan="fastv(layer=1, keep=6)", rows=ROWS)
    program = build_program(request, mesh, platform="cpu")
    with tracing_for("cpu", mesh):
        text = program.function.lower(*program.args).compile().as_text()
    return dict(read_traffic(text).collectives)


@pytest.mark.parametrize(
    ("sizes", "rows", "tie"), [("tensor=8", ROWS, False), ("data=2,tensor=4", ROWS // 2, True)]
)
def test_a_token_moves_two_sums_a_layer_and_one_for_its_embedding(sizes, rows, tie):
    experiment = make_experiment(mesh=sizes)
    if tie:
        llama = dataclasses.replace(experiment.model.llama, tie_embeddings=True)
        model = dataclasses.replace(experiment.model, llama=llama)
        experiment = dataclasses.replace(experiment, model=model)
    moved = moved_by_a_token(experiment)
    assert moved.keys() == {"all-reduce"}
    assert moved["all-reduce"].count == 2 * DEPTH + 1
    # CPUs sum in float32; nothing else is in it, no parameter and no part of the cache.
    assert moved["all-reduce"].result_bytes == (2 * DEPTH + 1) * rows * WIDTH * 4


def test_a_token_moves_nothing_where_parameters_are_copied():
    assert moved_by_a_token(make_experiment()) == {}


def test_kv_heads_that_do_not_divide_leave_the_cache_where_it_is():
    moved = moved_by_a_token(make_experiment(num_kv_heads=4, mesh="tensor=8"))
    sums = moved.pop("all-reduce")
    assert sums.result_bytes == (2 * DEPTH + 1) * ROWS * WIDTH * 4
    new_keys_and_values = DEPTH * 2 * ROWS * (WIDTH // 2) * 4
    assert sum(kind.result_bytes for kind in moved.values()) < 2 * new_keys_and_values


def one_matrix(gib):
    shape = (1024, int(gib * GIB) // 2 // 1024)
    return {"llama": {"up": {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}}}


@pytest.mark.parametrize(
    ("gib", "devices", "slices", "kv_heads", "tensor"),
    [
        (7, 64, 1, 32, 1),  # fits into half of a v5e's 15.75 GiB
        (16, 64, 1, 32, 4),
        (16, 64, 1, 2, 2),  # the kv heads divide no further
        (64, 64, 1, 8, 8),
        (64, 8, 4, 32, 2),  # nor do the devices of a slice
        (16, 1, 1, 32, 1),
    ],
)
def test_layers_are_split_as_far_as_memory_asks_for(gib, devices, slices, kv_heads, tensor):
    chosen = layout.choose_mesh(
        one_matrix(gib),
        num_devices=devices,
        slices=slices,
        tensor_divisor=kv_heads,
        memory_bytes=CHIPS["TPU v5 lite"].memory_bytes,
    )
    assert chosen == MeshConfig(data=devices // tensor, fsdp=1, tensor=tensor)


def test_parameters_are_copied_where_the_memory_is_not_known():
    chosen = layout.choose_mesh(
        one_matrix(999), num_devices=8, slices=1, tensor_divisor=8, memory_bytes=None
    )
    assert chosen == MeshConfig(data=8, fsdp=1, tensor=1)


def test_the_mesh_is_chosen_by_chip_and_the_config_has_the_last_word(monkeypatch):
    slices = fake_slices(2)
    assert layout.inference_mesh(make_experiment(), devices=slices).shape["data"] == 128
    v5e = CHIPS["TPU v5 lite"]
    small = dataclasses.replace(v5e, memory_bytes=2**22)
    monkeypatch.setitem(CHIPS, "TPU v5 lite", small)
    mesh = layout.inference_mesh(make_experiment(), devices=slices)
    assert isinstance(mesh, Mesh) and dict(mesh.shape) == {"data": 32, "fsdp": 1, "tensor": 4}
    for asked in ("data=2,fsdp=64", {"data": 2, "fsdp": -1}):
        mesh = layout.inference_mesh(make_experiment(mesh=asked), devices=slices)
        assert dict(mesh.shape) == {"data": 2, "fsdp": 64, "tensor": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh": "tensor=3"}, "eval.mesh data=1, fsdp=1, tensor=3 does not fit 8 devices"),
        ({"mesh": "many"}, "eval.mesh: expected such as data=1,fsdp=64, got 'many'"),
        ({"mesh": {"tensr": 8}}, "config.eval.mesh.tensr: no such field. Did you mean 'tensor'?"),
        ({"mesh": 8}, "config.eval.mesh: expected str, got 8 (int)"),
        ({"param_dtype": "int8"}, "config.eval.param_dtype: expected one of auto, float32,"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(fields, message):
    with pytest.raises(ConfigError) as error:
        layout.inference_mesh(make_experiment(**fields), devices=jax.devices()[:8])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_matrices_take_the_dtype_and_what_is_computed_in_float32_keeps_it():
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])

    def dtypes(experiment):
        shapes = layout.param_shapes(experiment, mesh=mesh, dtype=layout.param_dtype(experiment))
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype.name
            for path, leaf in leaves
        }

    found = dtypes(make_experiment())
    assert {name.split("/")[-1] for name, dtype in found.items() if dtype == "bfloat16"} == {
        "kernel",
        "embedding",
    }
    assert {name.split("/")[-1] for name, dtype in found.items() if dtype == "float32"} == {
        "bias",
        "scale",
        "position_embedding",
    }
    assert set(dtypes(make_experiment(param_dtype="float32")).values()) == {"float32"}
    assert set(dtypes(make_experiment(dtype="float32")).values()) == {"float32"}


def trained(experiment, mesh):
    shapes = layout.param_shapes(experiment, mesh=mesh)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype("f4"), leaf.sharding),
        shapes,
    )


@pytest.mark.parametrize("asked", ["auto", "data=2,tensor=4"])
def test_training_evaluates_what_evaluation_would_load(asked):
    experiment = make_experiment(mesh=asked)
    mesh = make_mesh(experiment.train.mesh, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        params = trained(experiment, mesh)
        held, target = layout.during_training(params, experiment, mesh=mesh)
    expected = layout.param_shapes(
        experiment,
        mesh=layout.inference_mesh(experiment, devices=jax.devices()[:8]),
        dtype="bfloat16",
    )
    assert list(target.devices.flat) == list(mesh.devices.flat)

    def check(leaf, before, like):
        assert (leaf.dtype, leaf.sharding.spec) == (like.dtype, like.sharding.spec)
        np.testing.assert_array_equal(leaf, np.asarray(before).astype(like.dtype))

    jax.tree.map(check, held, params, expected)


def test_nothing_is_copied_where_training_holds_parameters_as_inference_does():
    experiment = make_experiment(dtype="float32")
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:8])
    params = trained(experiment, mesh)
    held, target = layout.during_training(params, experiment, mesh=mesh)
    assert target.shape["data"] == 8
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (held, params)), strict=True))


def test_training_leaves_room_for_what_it_holds(monkeypatch):
    experiment = make_experiment()
    mesh = make_mesh(experiment.train.mesh, devices=jax.devices()[:8])
    params = trained(experiment, mesh)
    alone = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    shapes = layout.param_shapes(experiment, mesh=alone, dtype="bfloat16")
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    monkeypatch.setattr(layout, "_memory_bytes", lambda devices: 2.1 * whole)
    assert layout.inference_mesh(experiment, devices=jax.devices()[:8]).shape["tensor"] == 1
    assert layout.during_training(params, experiment, mesh=mesh)[1].shape["tensor"] == 2


def test_a_cache_is_split_by_rows_and_heads():
    experiment = make_experiment(mesh="data=2,tensor=4")
    mesh = layout.inference_mesh(experiment, devices=jax.devices()[:8])
    request = Request("prefill", experiment, plan="full", rows=ROWS)
    program = build_program(request, mesh, platform="cpu")
    with tracing_for("cpu", mesh):
        compiled = jax.jit(program.function.__wrapped__).lower(*program.args).compile()
    (layers,) = compiled.output_shardings[1].ranges
    by_rows = ("data", "fsdp")
    by_heads = NamedSharding(mesh, P(None, by_rows, None, "tensor", None))
    assert layers.k.is_equivalent_to(by_heads, 5) and layers.v.is_equivalent_to(by_heads, 5)
    assert layers.valid.is_equivalent_to(NamedSharding(mesh, P(by_rows)), 2)


def test_fields_have_their_defaults_and_are_read_once():
    fields = make_experiment().eval
    assert (fields.mesh, fields.param_dtype) == ("auto", "auto")
    fields = make_experiment(mesh="data=2,tensor=4").eval
    assert fields.mesh == MeshConfig(2, 1, 4)
    assert make_experiment(mesh=dataclasses.asdict(fields)["mesh"]).eval.mesh == fields.mesh


def test_shardings_follow_the_rules():
    experiment = make_experiment(mesh="tensor=8")
    mesh = layout.inference_mesh(experiment, devices=jax.devices()[:8])
    shapes = layout.param_shapes(experiment, mesh=mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, shapes) == parameter_shardings(
        shapes, mesh, rules=Eagle(experiment.model).sharding_rules
    )
    assert shapes["llama"]["head"]["kernel"].sharding.spec == P("fsdp", "tensor")
