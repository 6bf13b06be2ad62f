"""What the backward pass finds saved under each policy, and which policies a config may name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from meteor_jax.models.decoders.llama.model import LlamaBlock, LlamaConfig, rope_freqs
from meteor_jax.models.eagle.config import MeteorConfig
from meteor_jax.models.encoders.clip.model import ClipConfig
from meteor_jax.models.layers.attention import attend
from meteor_jax.models.layers.platform import compiling_for
from meteor_jax.models.layers.stack import Stack, dense
from tests.programs import count_primitives, saved_bytes

CONFIG = LlamaConfig(depth=3, width=16, num_heads=2, num_kv_heads=1, mlp_dim=24, vocab_size=8)
LENGTH = 6
X = jnp.ones((2, LENGTH, CONFIG.width))


class MLP(nn.Module):
    """Two layers of any kind."""

    config: object
    dtype: object

    @nn.compact
    def __call__(self, x):
        layer = functools.partial(self.config, dtype=self.dtype)
        return x + layer(8, name="down")(jnp.tanh(layer(24, name="up")(x))), None


def saved(remat, *, block=LlamaBlock, config=CONFIG, aux=None):
    """Bytes that the gradient of three blocks finds saved, besides what it is given."""
    stack = Stack(block, config, CONFIG.depth, remat=remat)
    x = X if block is LlamaBlock else jnp.ones((2, LENGTH, 8))
    if aux is None:
        position = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
        aux = (rope_freqs(position, config=CONFIG), None)
    variables = jax.eval_shape(functools.partial(stack.init), jax.random.key(0), x, *aux)
    given = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    return saved_bytes(lambda v: stack.apply(v, x, *aux).x.sum(), variables) - given


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_policies_tell_products_from_the_rest(platform):
    with compiling_for(platform):
        nothing, narrow, dots = map(
            saved, ("nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable")
        )
        assert nothing < narrow < dots < saved("everything_saveable")


@pytest.mark.parametrize("remat", ["dots_saveable", "nothing_saveable"])
def test_dense_is_saved_as_flax_would(remat):
    ours, theirs = (saved(remat, block=MLP, config=layer, aux=()) for layer in (dense, nn.Dense))
    assert ours == theirs


def test_named_values_are_saved():
    """A layer's float32 values: q, k and v of 2 + 1 + 1 heads of 8; and an MLP of twice 24."""
    nothing, rows = saved("nothing_saveable"), CONFIG.depth * 2 * LENGTH * 4
    assert saved("save_only_these_names(qkv)") - nothing == rows * (16 + 8 + 8)
    assert saved("save_only_these_names(qkv, mlp)") - nothing == rows * (32 + 48)
    assert saved("save_only_these_names(attention)") - nothing == rows * 16
    assert saved("save_only_these_names(residual)") - nothing == rows * 16


def test_splash_attention_is_not_computed_again_where_it_is_saved():
    q = jnp.ones((1, 128, 2, 8))

    def kernels(policy):
        run = jax.checkpoint(functools.partial(attend, kernel="splash", causal=True), policy=policy)
        gradient = jax.grad(lambda q: jnp.sin(run(q, q, q)).sum())
        program, _ = dce_jaxpr(jax.make_jaxpr(gradient)(q).jaxpr, [True])
        return count_primitives(program, "pallas_call")

    assert kernels(jax.checkpoint_policies.nothing_saveable) == 4  # twice forward, twice backward
    named = jax.checkpoint_policies.save_only_these_names("qkv", "attention")
    assert kernels(named) == 3


def test_gradients_do_not_depend_on_the_policy():
    position = np.broadcast_to(np.arange(LENGTH), (2, LENGTH))
    aux = (jax.jit(functools.partial(rope_freqs, config=CONFIG))(position), None)
    x = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
    variables = jax.jit(Stack(LlamaBlock, CONFIG, 3).init)(jax.random.key(0), x, *aux)

    def gradient(remat):
        stack = Stack(LlamaBlock, CONFIG, 3, remat=remat)
        return jax.jit(jax.grad(lambda v: (stack.apply(v, x, *aux).x ** 2).sum()))(variables)

    plain = gradient("none")
    for remat in ("dots_saveable", "save_only_these_names(attention, mlp)"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-4), gradient(remat), plain
        )


@pytest.mark.parametrize(
    ("remat", "message"),
    [
        ("save_only_these_names", "clip.remat: expected 'none' or a name"),
        ("save_from_both_policies", "clip.remat: expected 'none' or a name"),
        ("nothing", "clip.remat: expected 'none' or a name"),
        ("dots_saveable(mlp)", "clip.remat: expected 'none' or a name"),
        ("save_only_these_names(mpl)", "clip.remat: .*expected names out of qkv, .*got 'mpl'"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_when_the_config_is_read(remat, message):
    with pytest.raises(ValueError, match=message) as error:
        MeteorConfig(encoders={"clip": ClipConfig(remat=remat)})
    assert "\n" not in str(error.value)
