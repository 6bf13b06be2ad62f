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
    x, changes = np.random.default_rng(0).normal(size=(2, 3, 2, 5, 2, 4)).astype(np.float32)

    def run(x):
        return jnp.sin(attend(*x, causal=True, kernel="xla")).sum()

    @jax.jit
    def both_ways(x):
        return jax.jvp(run, (x,), (changes,))[1], (jax.grad(run)(x) * changes).sum()

    with compiling_for(platform):
        np.testing.assert_allclose(*both_ways(x), rtol=1e-5)


def test_gated_silu_is_its_formula():
    x, changes = map(tuple, np.random.default_rng(0).normal(size=(2, 2, 7)).astype(np.float32))

    def formula(gate, up):
        return gate / (1 + jnp.exp(-gate)) * up

    ours, theirs = jax.jit(lambda: [jax.jvp(f, x, changes) for f in (gated_silu, formula)])()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
