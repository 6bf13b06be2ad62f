import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.encoders.convnext.model import (
    ConvNext,
    ConvNextConfig,
    depthwise_conv,
    depthwise_conv_tpu,
    depthwise_shifted,
)
from tests.encoder_steps import segment_steps


@functools.partial(jax.jit, static_argnames="form")
def derivatives(x, kernel, changes, *, form):
    """A form's value, its gradients of a weighted sum, and how it changes."""
    weight = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    value, back = jax.vjp(form, x, kernel)
    return value, back(weight), jax.jvp(form, (x, kernel), changes)[1]


@pytest.mark.parametrize("form", [depthwise_shifted, depthwise_conv_tpu])
def test_depthwise_forms_are_equal(form):
    random = np.random.default_rng(0)
    x, dx = random.normal(size=(2, 2, 9, 6, 5)).astype(np.float32)
    kernel, dkernel = random.normal(size=(2, 7, 7, 1, 5)).astype(np.float32)
    ours, theirs = (
        derivatives(x, kernel, (dx, dkernel), form=one) for one in (form, depthwise_conv)
    )
    (value, gradients, change), (true_value, true_gradients, true_change) = ours, theirs
    np.testing.assert_allclose(value, true_value, rtol=1e-5, atol=1e-5)
    for mine, other in zip(gradients, true_gradients, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(change, true_change, atol=1e-4)


def test_depthwise_by_hand():
    """A single bright pixel spreads as the flipped kernel; outside the grid there are zeros."""
    x = np.zeros((1, 7, 7, 1), np.float32)
    x[0, 3, 3, 0] = 1.0
    kernel = np.arange(49, dtype=np.float32).reshape(7, 7, 1, 1)
    spread = jax.jit(depthwise_shifted)(x, kernel)
    np.testing.assert_array_equal(spread[0], kernel[::-1, ::-1, 0])


@pytest.mark.parametrize(("num_stages", "grid"), [(1, 16), (2, 8), (3, 4), (4, 2)])
def test_any_number_of_stages(num_stages, grid):
    config = ConvNextConfig(image_size=64, depths=(1,) * num_stages, widths=(4,) * num_stages)
    assert config.grid == grid
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    out, _ = jax.eval_shape(ConvNext(config).init_with_output, jax.random.key(0), image)
    assert out.x.shape == (1, grid**2, 4)


def trace(config, steps):
    init = functools.partial(ConvNext(config).init_with_output, steps=steps)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))[0]


def test_tokens_are_dropped_at_the_end_only():
    config = ConvNextConfig(image_size=16, depths=(1,), widths=(4,))
    assert config.prunable == (False, False, True)
    with pytest.raises(ValueError, match=r"encoder.segment2: .* keep all 16 there"):
        trace(config, segment_steps((16, 8, 8)))


def test_without_attention_the_mean_token_decides():
    config = ConvNextConfig(image_size=16, depths=(1,), widths=(4,))
    assert trace(config, segment_steps((16, 16, 8), "attention")).x.shape == (1, 8, 4)


def test_bad_sizes():
    with pytest.raises(ValueError, match="multiple of 32"):
        ConvNextConfig(image_size=1000)
    with pytest.raises(ValueError, match="one number a stage"):
        ConvNextConfig(depths=(1, 2))
