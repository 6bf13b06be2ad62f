import functools

import jax
import numpy as np
import pytest

from meteor_jax.models.encoders.pix2struct.model import Pix2Struct, Pix2StructConfig, preprocess
from meteor_jax.models.layers.resize import IMAGE_MEAN, IMAGE_STD
from tests.encoder_steps import segment_steps

CONFIG = Pix2StructConfig(
    grid_side=4, patch_size=4, width=8, depth=3, num_heads=2, mlp_dim=12, num_positions=6
)
KEEP = 7


def images():
    return np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


@functools.cache
def random_params():
    shapes = jax.eval_shape(Pix2Struct(CONFIG).init, jax.random.key(0), images())["params"]
    random = np.random.default_rng(1)
    return jax.tree.map(lambda s: random.normal(scale=0.5, size=s.shape).astype(s.dtype), shapes)


def test_pixels_are_standardised_together():
    """Over rows, columns and channels of one image, whatever its neighbours."""
    grey = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3))
    grey[1] *= 0.1
    normalised = (grey / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    mean, std = grey.mean((1, 2, 3), keepdims=True), grey.std((1, 2, 3), keepdims=True)
    out = jax.jit(preprocess, static_argnames="size")(normalised.astype(np.float32), size=16)
    np.testing.assert_allclose(out, (grey - mean) / std, atol=1e-4)


def test_blank_image_stays_finite():
    run = jax.jit(functools.partial(preprocess, size=8))
    assert np.abs(run(np.zeros((1, 16, 16, 3), np.float32))).max() < 1e3
    one_grey = ((0.5 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)).astype(np.float32)
    out = run(np.broadcast_to(one_grey, (1, 16, 16, 3)))
    np.testing.assert_allclose(out, 0.0, atol=0.01)


def test_ids_count_from_one():
    """Row 0 of both tables, and rows beyond the grid, are never read."""
    model = Pix2Struct(CONFIG)
    grad = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, images()).x ** 2).sum()))
    grads = grad(random_params())
    for table in ("row_embedding", "column_embedding"):
        read = np.abs(grads[table]).max(-1) > 0
        np.testing.assert_array_equal(read, [False, True, True, True, True, False])


def test_attention_received_is_the_maps_column_mean():
    model = Pix2Struct(CONFIG)
    params = random_params()
    run = functools.partial(
        model.apply,
        steps=segment_steps((KEEP,), "attention"),
        capture_intermediates=lambda module, _: module.name == "patch_embedding",
        mutable=["intermediates"],
    )
    out, state = jax.jit(run)({"params": params}, images())
    x = np.asarray(state["intermediates"]["patch_embedding"]["__call__"][0])
    rows, columns = params["row_embedding"], params["column_embedding"]
    x = (x + rows[1:5][:, None] + columns[1:5][None]).reshape(2, 16, 8)

    layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"]["stack"])
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["norm1"]["scale"]
    q, k = (
        (x @ layer["attention"][name]["kernel"]).reshape(2, 16, 2, 4).transpose(0, 2, 1, 3)
        for name in ("query", "key")
    )
    logits = q @ k.transpose(0, 1, 3, 2)  # no 1/√d
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    scores = (weights / weights.sum(-1, keepdims=True)).mean((1, 2))
    expected = np.sort(np.argsort(-scores, axis=-1)[:, :KEEP], axis=-1)
    np.testing.assert_array_equal(out.kept[0], expected)


def test_there_is_no_cls():
    with pytest.raises(ValueError, match="Pix2Struct has none"):
        Pix2Struct(CONFIG).init(jax.random.key(0), images(), steps=segment_steps((4,), "cls"))


def test_bad_sizes():
    with pytest.raises(ValueError, match="more than grid_side 45"):
        Pix2StructConfig(num_positions=45)
    with pytest.raises(ValueError, match="multiple of num_heads 7"):
        Pix2StructConfig(num_heads=7)
