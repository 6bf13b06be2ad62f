"""Eight simulated devices compute what one does, and nothing of size lies on them all.

Programs of the real model compile for long. So one mesh and one encoder are tested always, all
meshes and two encoders under the marker `slow`.
"""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meteor_jax.config import build
from meteor_jax.experiment.config import StageConfig
from meteor_jax.models.decoders.llama.model import LlamaConfig
from meteor_jax.models.eagle.family import Eagle
from meteor_jax.models.eagle.model import Meteor, MeteorConfig
from meteor_jax.models.eagle.presets import eagle_config
from meteor_jax.models.encoders.clip.model import ClipConfig
from meteor_jax.models.encoders.pix2struct.model import Pix2StructConfig
from meteor_jax.models.family import build_model
from meteor_jax.parallel.mesh import AXES, BATCH_AXES, MeshConfig, make_mesh
from meteor_jax.parallel.rules import parameter_shardings, shard_batch
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.text import parse_plan
from meteor_jax.training.optimizer import make_optimizer
from meteor_jax.training.state import make_state
from meteor_jax.training.step import make_train_step
from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN, Batch, VisualTokens
from tests.compiled import collectives

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2))
ROWS, TEXT_LENGTH, STEPS, NEW_TOKENS = 8, 10, 20, 3
# float32: devices sum rows and channels in another order, and 20 steps build on it.
LOSS_RTOL, LOGITS_ATOL = 5e-6, 2e-5

TWO = MeteorConfig(
    encoders={
        "clip": ClipConfig(image_size=32, patch_size=8, width=16, depth=3, num_heads=2, mlp_dim=24),
        "pix2struct": Pix2StructConfig(
            grid_side=4, patch_size=8, width=16, depth=3, num_heads=2, mlp_dim=24, num_positions=8
        ),
    },
    llama=LlamaConfig(
        depth=2,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=48,
        vocab_size=48,
        max_positions=64,
        init_std=0.2,
    ),
    image_size=32,
)
ONE = TWO.with_encoders("clip")
RANKS = Calibration(ranks={"energy 0.99": {"clip": (4.0, 5.0, 6.0), "pix2struct": (2.0, 3.0, 4.0)}})
STAGE_3 = "layers=(1,), keep=(6,), decode.heads=2, decode.lambda_=5.0"
PLANS = {
    ONE: parse_plan(f"meteor(encode=(14, 12, 10), fuse=8, {STAGE_3})").calibrated(RANKS),
    TWO: parse_plan(f"meteor(encode=(24, 20, 18), fuse=14, {STAGE_3})").calibrated(RANKS),
}
STAGE = build(StageConfig, {"steps": STEPS, "batch_size": ROWS, "learning_rate": 1e-3})


@pytest.fixture(autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_batch(seed, *, side=32):
    """Rows of unequal length, one of them without an image."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 48, (ROWS, TEXT_LENGTH)).astype(np.int32)
    tokens[1:, 2] = IMAGE_TOKEN
    text_valid = np.arange(TEXT_LENGTH) < rng.integers(5, TEXT_LENGTH + 1, (ROWS, 1))
    return Batch(
        images=rng.integers(0, 256, (ROWS, 1, side, side, 3)).astype(np.uint8),
        image_valid=(np.arange(ROWS) > 0)[:, None],
        tokens=np.where(text_valid, tokens, 0),
        text_valid=text_valid,
        labels=np.where(text_valid & (tokens != IMAGE_TOKEN), tokens, IGNORE_LABEL),
        example_id=np.arange(ROWS, dtype=np.int32),
    )


RULES = Eagle(eagle_config("x5_7b")).sharding_rules


def mesh_of(sizes):
    return make_mesh(MeshConfig(*sizes), devices=jax.devices()[: math.prod(sizes)])


def fresh_state(model, batch, *, use_ema=False):
    return make_state(
        model.init_params(batch, seed=0),
        optimizer=make_optimizer(STAGE),
        trainable=STAGE.trainable,
        rng=jax.random.PRNGKey(0),
        use_ema=use_ema,
    )


def train_step(config, shardings):
    return make_train_step(
        build_model(config),
        optimizer=make_optimizer(STAGE),
        plan=PLANS[config],
        stage=STAGE,
        state_shardings=shardings,
    )


def place(tree, mesh):
    return jax.device_put(tree, parameter_shardings(tree, mesh, rules=RULES))


def losses(config, *, sizes):
    """Losses of the steps, and how often the step was compiled."""
    mesh = mesh_of(sizes)
    state = place(initial_state(config), mesh)
    found = []
    with jax.set_mesh(mesh):
        step = train_step(config, parameter_shardings(state, mesh, rules=RULES))
        for seed in range(STEPS):
            state, metrics = step(state, shard_batch(make_batch(seed), mesh))
            found.append(float(metrics["loss"]))
    return np.asarray(found), step._cache_size()


@functools.cache
def initial_state(config):
    return jax.device_get(jax.jit(lambda: fresh_state(build_model(config), make_batch(0)))())


@functools.cache
def losses_of_one_device(config):
    return losses(config, sizes=(1, 1, 1))[0]


def answer(config, *, sizes):
    """Logits of prompts and of the tokens after them, and what was kept, on the host."""
    model, plan, mesh = Meteor(config), PLANS[config], mesh_of(sizes)

    @jax.jit
    def run(params, visual, batch, new_tokens):
        variables = {"params": params}
        prefilled = model.apply(
            variables,
            visual,
            image_valid=batch.image_valid,
            tokens=batch.tokens,
            text_valid=batch.text_valid,
            plan=plan,
            max_new_tokens=NEW_TOKENS,
            method="prefill",
        )
        extended = model.apply(variables, prefilled.cache, new_tokens, method="extend")
        kept = [(step.visual, step.num_kept) for step in prefilled.prune_steps]
        return {"prefill": prefilled.logits, "extend": extended.logits, "kept": kept}

    params = place(initial_state(config).params, mesh)
    new_tokens = np.arange(ROWS * NEW_TOKENS, dtype=np.int32).reshape(ROWS, NEW_TOKENS)
    inputs = make_visual(plan.fusion_steps[0].budget.keep), make_batch(0), new_tokens
    with jax.set_mesh(mesh):
        return jax.device_get(run(params, *shard_batch(inputs, mesh)))


def make_visual(num_tokens):
    """Visual tokens as stages 1 and 2 would leave them."""
    rng = np.random.default_rng(0)
    place = np.broadcast_to(np.arange(num_tokens, dtype=np.int32), (ROWS, 1, num_tokens))
    x = rng.normal(size=(*place.shape, TWO.llama.width)).astype(np.float32)
    return VisualTokens(x=x, encoder=0 * place, patch_index=place, position=place, span=num_tokens)


@functools.cache
def answer_of_one_device(config):
    return answer(config, sizes=(1, 1, 1))


on_meshes = pytest.mark.parametrize(
    ("config", "sizes"),
    [
        pytest.param(ONE, (2, 2, 2), id="one encoder, 2x2x2"),
        *(
            pytest.param(
                TWO, sizes, id="two encoders, {}x{}x{}".format(*sizes), marks=pytest.mark.slow
            )
            for sizes in MESHES
        ),
    ],
)


@pytest.mark.long
@on_meshes
def test_training_loses_what_one_device_loses(config, sizes, capfd):
    found, compilations = losses(config, sizes=sizes)
    assert compilations == 1
    assert len(set(found)) == STEPS
    np.testing.assert_allclose(found, losses_of_one_device(config), rtol=LOSS_RTOL)
    assert "full rematerialization" not in capfd.readouterr().err


@on_meshes
def test_evaluation_with_stage_3_answers_as_one_device(config, sizes, capfd):
    found, expected = answer(config, sizes=sizes), answer_of_one_device(config)
    for name in ("prefill", "extend"):
        np.testing.assert_allclose(found[name], expected[name], atol=LOGITS_ATOL, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, found["kept"], expected["kept"])
    assert len(set(expected["kept"][0][1][1:])) > 1  # budgets differ, or nothing was adaptive
    assert "full rematerialization" not in capfd.readouterr().err


def constraints(text):
    """Every array that a program in StableHLO pins, as (dimensions, axes of each)."""
    found = re.findall(r"sdy\.sharding_constraint %\S+ <@mesh, \[(.*)\]> : tensor<([\dx]+)x", text)
    return {
        (shape, tuple(re.sub(r'[" {}]', "", axes) for axes in re.findall(r"\{.*?\}", spec)))
        for spec, shape in found
    }


def lowered_step(mesh):
    """The train step's StableHLO, from shapes alone."""
    batch = make_batch(0)
    state = jax.eval_shape(lambda: fresh_state(build_model(ONE), batch))
    shardings = parameter_shardings(state, mesh, rules=RULES)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def with_sharding(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(with_sharding, state, shardings)
    batch = jax.tree.map(lambda leaf: with_sharding(leaf, rows), batch)
    return train_step(ONE, shardings).lower(state, batch).as_text()


def test_lowered_program_holds_its_constraints():
    mesh = mesh_of((2, 2, 2))
    joined = TEXT_LENGTH + PLANS[ONE].fusion_steps[0].budget.keep
    rows, whole, heads = "data,fsdp", "", "tensor"
    expected = {
        (f"{ROWS}x{joined}x32", (rows, whole, whole)),  # the residual stream
        (f"{ROWS}x{joined}x4x8", (rows, whole, heads, whole)),  # queries
        (f"{ROWS}x{joined}x2x8", (rows, whole, heads, whole)),  # keys and values
        (f"{ROWS}x{joined}x48", (rows, whole, heads)),  # the MLP's middle
        (f"{ROWS}x{TEXT_LENGTH}x32", ("data", whole, "fsdp")),  # text as the table lies
        (f"{ROWS}x{TEXT_LENGTH}x32", (rows, whole, whole)),  # text by rows
        (f"{ROWS}x{TEXT_LENGTH}x48", (rows, whole, heads)),  # logits
        (f"{ROWS}x8x32", (rows, whole, whole)),  # fused tokens
        (f"{ROWS}x16x16", (rows, whole, whole)),  # an encoder's tokens
        (f"{ROWS}x14x16", (rows, whole, whole)),  # the same after a cut
    }
    with jax.set_mesh(mesh):
        assert constraints(lowered_step(mesh)) >= expected
    assert not constraints(lowered_step(mesh))  # off the mesh nothing is pinned


def test_encoding_under_meteor_gathers_nothing_but_parameters():
    model, mesh, batch = Meteor(ONE), mesh_of((1, 8, 1)), make_batch(0)
    params = jax.eval_shape(lambda: build_model(ONE).init_params(batch, seed=0))
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        parameter_shardings(params, mesh, rules=RULES),
    )
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    images = jax.ShapeDtypeStruct((2 * ROWS, 32, 32, 3), np.uint8, sharding=rows)
    encode = functools.partial(model.apply, plan=PLANS[ONE], method="encode_images")
    with jax.set_mesh(mesh):
        text = (
            jax.jit(lambda params, images: encode({"params": params}, images))
            .lower(params, images)
            .compile()
            .as_text()
        )
    found = collectives(text)
    assert found
    # What multiplies tokens, and the table of positions that is added to them.
    uses = ("dot_general", "clip._embed/add")
    assert [name for name in found if not name.endswith(uses)] == []


@pytest.mark.parametrize(("name", "fusion"), [("x4_7b", "post"), ("x5_7b", "pre")])
def test_nothing_of_size_is_whole_on_every_device(name, fusion):
    """No parameter, moment of the optimizer or moving average above 1 MB."""
    model = build_model(eagle_config(name, fusion=fusion))
    one_row = jax.tree.map(lambda leaf: leaf[1:2], make_batch(0, side=1024))
    state = jax.eval_shape(lambda: fresh_state(model, one_row, use_ema=True))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) > 8e9
    for sizes in ((1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 256, 1)):
        shardings = parameter_shardings(state, jax.sharding.AbstractMesh(sizes, AXES), rules=RULES)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        whole = [
            jax.tree_util.keystr(path)
            for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
            if leaf.size * leaf.dtype.itemsize > 2**20
            and sharding.shard_shape(leaf.shape) == leaf.shape
        ]
        assert whole == [], sizes
