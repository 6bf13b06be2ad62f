"""Programs for other platforms hold no form of the CPU's, and everything differentiates forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.layers.attention import attend
from meteor_jax.models.layers.platform import compiling_for
from meteor_jax.models.layers.stack import gated_silu
from tests import tiny_model as tiny
from tests.programs import count_primitives, differentiates_forward

PLAN = tiny.plan("meteor(encode=(26, 22, 30), fuse=20)")


def loss(params):
    forward = tiny.MODEL.apply({"params": params}, tiny.make_batch(), plan=PLAN)
    return jax.nn.logsumexp(forward.logits, axis=-1).sum()


def parameters():
    return jax.eval_shape(
        functools.partial(tiny.MODEL.init, plan=PLAN), jax.random.key(0), tiny.make_batch()
    )["params"]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_whole_model_differentiates_forward(platform):
    with compiling_for(platform):
        assert differentiates_forward(loss, parameters())


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_no_form_of_the_cpus_is_in_other_platforms_programs(platform):
    with compiling_for(platform):
        program = jax.make_jaxpr(loss)(parameters())
        assert count_primitives(program, "custom_vjp_call", "custom_vjp_call_jaxpr") == 0
        # The depthwise convolutions, one a block, and not the CPU's sums of shifted products.
        assert count_primitives(program, "conv_general_dilated") == 2
        q = jnp.ones((1, 600, 2, 4))  # longer than a chunk of the CPU's
        chunked = jax.make_jaxpr(functools.partial(attend, kernel="xla"))(q, q, q)
        assert count_primitives(chunked, "scan", "while", "custom_jvp_call") == 0


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_attention_differentiates_alike_both_ways(platform):
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v, *changes = (jax.random.normal(key, (2, 5, 2, 4)) for key in keys)

    def run(q, k, v):
        return jnp.sin(attend(q, k, v, causal=True, kernel="xla")).sum()

    with compiling_for(platform):
        _, moved = jax.jvp(run, (q, k, v), tuple(changes))
        gradients = jax.grad(run, (0, 1, 2))(q, k, v)
    product = sum((a * b).sum() for a, b in zip(gradients, changes, strict=True))
    np.testing.assert_allclose(moved, product, rtol=1e-5)


def test_gated_silu_is_its_formula():
    gate, up = jax.random.normal(jax.random.key(0), (2, 7))
    change = (jnp.cos(gate), jnp.sin(up))
    for ours, theirs in zip(
        jax.jvp(gated_silu, (gate, up), change),
        jax.jvp(lambda gate, up: gate / (1 + jnp.exp(-gate)) * up, (gate, up), change),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
