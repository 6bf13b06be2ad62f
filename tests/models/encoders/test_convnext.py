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
from meteor_jax.pruning.encode import EncoderCut


@pytest.mark.parametrize("form", [depthwise_shifted, depthwise_conv_tpu])
def test_depthwise_forms_are_equal(form):
    x = jax.random.normal(jax.random.key(0), (2, 9, 6, 5))
    kernel = jax.random.normal(jax.random.key(1), (7, 7, 1, 5))
    weight = jax.random.normal(jax.random.key(2), x.shape)

    def value_and_grad(form):
        return jax.value_and_grad(lambda x, k: (form(x, k) * weight).sum(), (0, 1))(x, kernel)

    np.testing.assert_allclose(form(x, kernel), depthwise_conv(x, kernel), rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        value_and_grad(form),
        value_and_grad(depthwise_conv),
    )


@pytest.mark.parametrize("form", [depthwise_shifted, depthwise_conv_tpu])
def test_depthwise_forms_change_alike(form):
    x, dx = jax.random.normal(jax.random.key(0), (2, 2, 9, 6, 5))
    kernel, dkernel = jax.random.normal(jax.random.key(1), (2, 7, 7, 1, 5))
    ours, theirs = (jax.jvp(one, (x, kernel), (dx, dkernel))[1] for one in (form, depthwise_conv))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_depthwise_by_hand():
    """A single bright pixel spreads as the flipped kernel; outside the grid there are zeros."""
    x = jnp.zeros((1, 7, 7, 1)).at[0, 3, 3, 0].set(1.0)
    kernel = jnp.arange(49.0).reshape(7, 7, 1, 1)
    np.testing.assert_array_equal(depthwise_shifted(x, kernel)[0], kernel[::-1, ::-1, 0])


@pytest.mark.parametrize(("num_stages", "grid"), [(1, 16), (2, 8), (3, 4), (4, 2)])
def test_any_number_of_stages(num_stages, grid):
    config = ConvNextConfig(image_size=64, depths=(1,) * num_stages, widths=(4,) * num_stages)
    assert config.grid == grid
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    out, _ = jax.eval_shape(ConvNext(config).init_with_output, jax.random.key(0), image)
    assert out.x.shape == (1, grid**2, 4)


def trace(config, cuts):
    init = functools.partial(ConvNext(config).init, cuts=cuts)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_only_the_output_can_be_cut():
    config = ConvNextConfig(image_size=16, depths=(1,), widths=(4,))
    assert config.cuttable == (False, False, True)
    with pytest.raises(ValueError, match=r"first two to keep all 16, got \[16, 8\]"):
        trace(config, cuts=(EncoderCut(16), EncoderCut(8), EncoderCut(8)))


def test_attention_cannot_be_asked_for():
    config = ConvNextConfig(image_size=16, depths=(1,), widths=(4,))
    cuts = (EncoderCut(16), EncoderCut(16), EncoderCut(8, "attention"))
    with pytest.raises(ValueError, match="needs attention"):
        trace(config, cuts=cuts)


def test_bad_sizes():
    with pytest.raises(ValueError, match="multiple of 32"):
        ConvNextConfig(image_size=1000)
    with pytest.raises(ValueError, match="one number a stage"):
        ConvNextConfig(depths=(1, 2))
