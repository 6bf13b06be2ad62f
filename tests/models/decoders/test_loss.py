"""The loss, whole and a part of the tokens at a time, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meteor_jax.models.decoders import loss
from meteor_jax.models.decoders.loss import hidden_loss, token_loss
from meteor_jax.models.layers.stack import constrain
from meteor_jax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh
from meteor_jax.types import IGNORE_LABEL
from tests.compiled import collectives

ROWS, LENGTH, WIDTH, VOCABULARY = 8, 10, 8, 32


def head(params, x):
    logits = jnp.matmul(x, params["kernel"], preferred_element_type=jnp.float32)
    return constrain(logits, "btv")


def make_inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.3] = IGNORE_LABEL
    params = {"kernel": rng.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)}
    return params, jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype), labels


def loss_and_gradients(params, x, labels):
    def mean(params, x):
        sums = hidden_loss(head, params, x, labels)
        return sums.loss / sums.count, sums

    return jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(params, x)


def test_loss_is_of_the_next_token():
    shares = np.float32([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]])
    sums = jax.jit(token_loss)(np.log(shares), np.array([[0, IGNORE_LABEL, 1]]))
    assert float(sums.count) == 1  # the first label has nothing before it
    assert float(sums.loss) == pytest.approx(-np.log(0.8))
    assert float(sums.correct) == 1


@pytest.mark.parametrize("sizes", [None, (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_parts_sum_up_to_the_whole(monkeypatch, sizes):
    inputs = make_inputs()

    def at_once(params, x, labels):
        return token_loss(head(params, x), labels), loss_and_gradients(params, x, labels)

    whole, expected = jax.jit(at_once)(*inputs)
    for name in ("loss", "correct", "count"):
        np.testing.assert_allclose(getattr(expected[0][1], name), getattr(whole, name), rtol=1e-6)
    # Three places at a time, the last of them with a place less.
    shards = 1 if sizes is None else 8
    monkeypatch.setattr(loss, "LOGIT_BYTES", 3 * ROWS * VOCABULARY * 4 // shards)
    if sizes is None:
        found = jax.jit(loss_and_gradients)(*inputs)
    else:
        with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
            found = jax.jit(loss_and_gradients)(*inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, expected
    )


def test_the_head_is_gathered_once_and_its_gradient_summed_up_once(monkeypatch):
    """However many parts there are; in bfloat16, which XLA's CPU backend cannot sum up here."""
    mesh = make_mesh(MeshConfig(1, 8, 1))
    specs = {"kernel": PartitionSpec("fsdp", "tensor")}, *(PartitionSpec(BATCH_AXES),) * 2
    inputs = jax.tree.map(
        lambda array, spec: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=NamedSharding(mesh, spec)
        ),
        make_inputs(jnp.bfloat16),
        specs,
    )
    monkeypatch.setattr(loss, "LOGIT_BYTES", ROWS * VOCABULARY * 4 // 8)
    with jax.set_mesh(mesh):
        text = jax.jit(loss_and_gradients).lower(*inputs).compile().as_text()
    assert "while" in text
    assert [name for name in collectives(text) if "while" in name] == []
    assert len(collectives(text)) == 3  # gathers the head; sums up the loss, and the gradient
