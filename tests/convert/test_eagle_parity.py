"""A converted EAGLE computes what its PyTorch code computes."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.checkpoint import restore_params
from meteor_jax.convert.loading import convert_checkpoint
from meteor_jax.inference.generate import generate
from meteor_jax.models.eagle.conversion import EagleConversion
from meteor_jax.models.eagle.fusion import to_common_grid
from meteor_jax.models.eagle.model import Meteor
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import parse_plan
from tests.convert import eagle_tiny

TOLERANCE = 2e-4  # of the largest magnitude
FULL = PrunePlan()
CONVERSION = EagleConversion()


@pytest.fixture(scope="module")
def golden():
    return eagle_tiny.outputs()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The model and its parameters, through a folder of shards and a workdir."""
    folder = tmp_path_factory.mktemp("eagle")
    source = eagle_tiny.write_eagle(folder / "source", eagle_tiny.weights())
    config = convert_checkpoint(source, folder / "out", overrides=eagle_tiny.OVERRIDES)
    shapes = CONVERSION.param_shapes(config, CONVERSION.parts(config, "eagle"))
    like = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    params = restore_params(folder / "out", flax.traverse_util.unflatten_dict(like, sep="/"))
    return Meteor(config), jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def encoded(converted):
    """The towers' outputs by name, and the visual tokens; one pass over the image."""
    model, params = converted
    names = model.config.encoders

    @jax.jit
    def encode(params, image):
        return model.apply(
            {"params": params},
            image,
            plan=FULL,
            method="encode_images",
            capture_intermediates=lambda module, _: module.name in names,
            mutable=["intermediates"],
        )

    out, state = encode(params, eagle_tiny.master_image())
    towers = {name: state["intermediates"][name]["__call__"][0].x for name in names}
    return towers, out.tokens


def assert_close(ours, theirs, tolerance=TOLERANCE):
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= tolerance, f"{error:.1e} of the largest magnitude"


@pytest.mark.parametrize("index, name", enumerate(["clip", "convnext", "eva02"]))
def test_tower(encoded, golden, index, name):
    raw = golden[f"tower{index}_raw"]
    if raw.ndim == 4:  # [I, E, H, W]
        raw = raw.reshape(*raw.shape[:2], -1).transpose(0, 2, 1)
    assert_close(encoded[0][name], raw)


def test_pix2struct(encoded, golden):
    """EAGLE brings this tower's 45×45 tokens to the common grid inside the tower."""
    x = to_common_grid([encoded[0]["pix2struct"]], grids=[45], grid=32)[0]
    raw = golden["tower3_raw"]
    assert_close(x, raw.reshape(*raw.shape[:2], -1).transpose(0, 2, 1))


def test_fused_and_projected(converted, encoded, golden):
    config, (towers, tokens) = converted[0].config, encoded
    grids = [config.encoder(name).grid for name in towers]
    fused = jnp.concatenate(to_common_grid(list(towers.values()), grids=grids, grid=32), axis=-1)
    assert_close(fused, golden["fused"])
    assert_close(tokens.x, golden["projected"])


def test_logits_and_loss(converted, encoded, golden):
    """The prompt up to the image is read at once, the four ids behind it one after another."""
    model, params = converted
    ids = jnp.asarray(golden["input_ids"], jnp.int32)
    visual = jax.tree.map(lambda array: array[:, None], encoded[1])

    @jax.jit
    def logits(params):
        prefilled = model.apply(
            {"params": params},
            visual,
            image_valid=jnp.ones((1, 1), bool),
            tokens=ids[:, :4],
            text_valid=jnp.ones((1, 4), bool),
            plan=FULL,
            max_new_tokens=4,
            method="prefill",
        )
        rest = model.apply({"params": params}, prefilled.cache, ids[:, 4:], method="extend")
        return jnp.concatenate([prefilled.logits[:, None], rest.logits], axis=1)

    ours = logits(params)
    assert_close(ours, golden["logits_text"])
    nll = -jnp.take_along_axis(jax.nn.log_softmax(ours[:, 1:-1]), ids[:, 5:, None], axis=-1)
    np.testing.assert_allclose(nll.mean(), golden["loss"], atol=1e-4)


def test_greedy(converted, encoded, golden):
    model, params = converted
    ids = jnp.asarray(golden["input_ids"], jnp.int32)
    visual = jax.tree.map(lambda array: array[:, None], encoded[1])
    out = generate(
        model,
        params,
        visual,
        image_valid=jnp.ones((1, 1), bool),
        tokens=ids,
        text_valid=jnp.ones(ids.shape, bool),
        plan=FULL,
        max_new_tokens=8,
        eos_id=2,
    )
    np.testing.assert_array_equal(out.tokens, golden["greedy8"])


@pytest.mark.parametrize("keep", [1024, 64])
def test_stage_3_runs_on_the_weights_as_they_are(converted, encoded, golden, keep):
    model, params = converted
    ids = jnp.asarray(golden["input_ids"], jnp.int32)
    visual = jax.tree.map(lambda array: array[:, None], encoded[1])
    plan = parse_plan(f"meteor(fuse=1024, layers=(1,), keep=({keep},), decode.budget=fixed)")
    out = generate(
        model,
        params,
        visual,
        image_valid=jnp.ones((1, 1), bool),
        tokens=ids,
        text_valid=jnp.ones(ids.shape, bool),
        plan=plan,
        max_new_tokens=8,
        eos_id=2,
    )
    (cut,) = out.prune_steps
    assert int(cut.num_kept[0]) == keep
    if keep == 1024:
        np.testing.assert_array_equal(out.tokens, golden["greedy8"])
