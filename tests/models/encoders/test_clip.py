import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.encoders.clip.model import Clip, ClipConfig, quick_gelu
from tests.encoder_steps import segment_steps

SIZES = {"image_size": 16, "patch_size": 4, "width": 8, "depth": 3, "num_heads": 2, "mlp_dim": 12}
KEEP = 7


def images():
    return np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def naive_map(params, x, num_heads=2):
    """float[I, H, T, S]: the first block's whole attention map, from the block's input."""
    layer = jax.tree.map(lambda leaf: leaf[0], params["blocks"]["stack"])
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * layer["norm1"]["scale"] + layer["norm1"]["bias"]

    def heads(name):
        dense = layer["attention"][name]
        y = x @ dense["kernel"] + dense["bias"]
        return y.reshape(*y.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)

    q, k = heads("query"), heads("key")
    return jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / q.shape[-1] ** 0.5, axis=-1)


def first_step(config, method):
    """Places kept after the first segment, and the input of the block before it."""
    model = Clip(config)
    random = np.random.default_rng(1)
    # Large weights, so that attention is far from even.
    variables = jax.tree.map(
        lambda leaf: random.normal(scale=0.7, size=leaf.shape).astype(leaf.dtype),
        jax.eval_shape(model.init, jax.random.key(1), images()),
    )
    apply = functools.partial(
        model.apply,
        steps=segment_steps((KEEP,), method),
        capture_intermediates=lambda module, _: module.name == "pre_norm",
        mutable=["intermediates"],
    )
    out, state = jax.jit(apply)(variables, images())
    x = state["intermediates"]["pre_norm"]["__call__"][0]
    return np.asarray(out.kept[0]), np.asarray(jax.jit(naive_map)(variables["params"], x))


def top(scores):
    return np.sort(np.argsort(-np.asarray(scores), axis=-1)[:, :KEEP], axis=-1)


@pytest.mark.parametrize("keep_cls", [False, True])
def test_attention_received_is_the_maps_column_mean(keep_cls):
    kept, weights = first_step(ClipConfig(**SIZES, keep_cls=keep_cls), "attention")
    np.testing.assert_array_equal(kept, top(weights.mean((1, 2))[:, int(keep_cls) :]))


def test_cls_attention_is_the_maps_first_row():
    kept, weights = first_step(ClipConfig(**SIZES, keep_cls=True), "cls")
    np.testing.assert_array_equal(kept, top(weights.mean(1)[:, 0, 1:]))


def test_cls_needs_a_cls_token():
    model = Clip(ClipConfig(**SIZES))
    with pytest.raises(ValueError, match="keep_cls=True"):
        model.init(jax.random.key(0), images(), steps=segment_steps((4,), "cls"))


def test_cls_token_is_a_parameter_only_where_it_is_read():
    def tree(keep_cls):
        model = Clip(ClipConfig(**SIZES, keep_cls=keep_cls))
        return jax.eval_shape(model.init, jax.random.key(0), images())["params"]

    assert "class_embedding" not in tree(False)
    assert tree(False)["position_embedding"].shape == (16, 8)
    assert tree(True)["class_embedding"].shape == (8,)
    assert tree(True)["position_embedding"].shape == (17, 8)


def test_quick_gelu():
    np.testing.assert_allclose(quick_gelu(jnp.array([0.0, 1.0])), [0, 1 / (1 + np.exp(-1.702))])


def test_bad_sizes():
    with pytest.raises(ValueError, match="multiple of patch_size 14"):
        ClipConfig(image_size=300)
    with pytest.raises(ValueError, match="multiple of num_heads 3"):
        ClipConfig(num_heads=3)


def test_positions_are_resampled_to_a_larger_grid():
    """A table of 2×2 places, all equal, says the same everywhere on the 4×4 grid."""
    model = Clip(ClipConfig(**SIZES, position_side=2))
    variables = jax.jit(model.init)(jax.random.key(1), images())
    assert variables["params"]["position_embedding"].shape == (4, 8)

    @functools.partial(jax.jit, static_argnames="model")
    def run(table, *, model=model):
        params = variables["params"] | {"position_embedding": table}
        return model.apply({"params": params}, images()).x

    equal = np.asarray(run(np.full((4, 8), 0.3, np.float32)))
    own = run(np.full((16, 8), 0.3, np.float32), model=Clip(ClipConfig(**SIZES)))
    np.testing.assert_allclose(equal, own, atol=1e-5)
    ramp = np.repeat(np.arange(4, dtype=np.float32)[:, None], 8, axis=1)
    assert np.abs(np.asarray(run(ramp * np.arange(8, dtype=np.float32))) - equal).max() > 1e-3
