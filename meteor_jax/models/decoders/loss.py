"""Next-token cross-entropy that never holds the logits of many tokens at once.

B rows, T text tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from meteor_jax.types import IGNORE_LABEL, Array

BATCH_AXES = ("data", "fsdp")  # of the mesh, as in parallel.mesh
# float32 logits that a device holds at a time; a backward pass holds two or three such arrays. Less
# would cost time: every part of the tokens reads the whole head and adds to its whole gradient.
LOGIT_BYTES = 512 << 20

Head = Callable[[Any, Array], Array]


class TokenLoss(flax.struct.PyTreeNode):
    """Sums over the supervised tokens of some rows, float32[]: cross-entropy, hits, tokens."""

    loss: Array
    correct: Array
    count: Array


def token_loss(logits: Array, labels: Array) -> TokenLoss:
    """Next-token cross-entropy: logits at t against labels at t + 1.

    Shapes:
        logits: float32[B, T, V]; labels: int32[B, T], `IGNORE_LABEL` where nothing is learnt.
    """
    return _sums(logits.astype(jnp.float32), _next(labels))


def hidden_loss(head: Head, params: Any, x: Array, labels: Array) -> TokenLoss:
    """`token_loss` of the logits `head(params, x)`, which are made for a part of the tokens at a
    time where those of all would be more than `LOGIT_BYTES` on a device; the backward pass makes
    them again.

    On a mesh each device goes through its own rows. So the head is gathered once, and its gradient
    summed up once, however many parts there are.

    Args:
        head: (params, float[B, t, D]) → float32[B, t, V]; each token's from its own state.
        params: what `head` reads, and no more; all of it comes to every data shard.

    Shapes:
        x: float[B, T, D]; labels: int32[B, T] as in `token_loss`.
    """
    labels = _next(labels)
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    if x.shape[0] % shards:
        shards = 1
    vocabulary = jax.eval_shape(head, params, x[:, :1]).shape[-1]
    columns = vocabulary / math.gcd(vocabulary, mesh.shape.get("tensor", 1))
    num_bytes = x.shape[0] // shards * x.shape[1] * columns * 4
    num_chunks = min(math.ceil(num_bytes / LOGIT_BYTES), x.shape[1])
    if num_chunks <= 1:
        return _sums(head(params, x), labels)
    if shards == 1:
        return _in_chunks(head, params, x, labels, num_chunks=num_chunks)

    def own_rows(params: Any, x: Array, labels: Array) -> TokenLoss:
        # As differing by device from here on, so that gradients are summed up here, in float32.
        params = jax.lax.pcast(params, BATCH_AXES, to="varying")
        sums = _in_chunks(head, params, x, labels, num_chunks=num_chunks)
        return jax.lax.psum(sums, BATCH_AXES)

    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        own_rows,
        in_specs=(PartitionSpec(), rows, rows),
        out_specs=PartitionSpec(),
        axis_names=set(BATCH_AXES),
    )(params, x, labels)


def _in_chunks(head: Head, params: Any, x: Array, labels: Array, *, num_chunks: int) -> TokenLoss:
    length = -(-x.shape[1] // num_chunks)
    missing = num_chunks * length - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, missing)), constant_values=IGNORE_LABEL)

    def chunks(array: Array) -> Array:
        return array.reshape(array.shape[0], num_chunks, length, *array.shape[2:]).swapaxes(0, 1)

    def body(carry: None, chunk: tuple[Array, Array]) -> tuple[None, TokenLoss]:
        x, labels = chunk
        return carry, _sums(head(params, x), labels)

    rematted = jax.checkpoint(body, prevent_cse=False)
    _, sums = jax.lax.scan(rematted, None, (chunks(x), chunks(labels)))
    return jax.tree.map(lambda array: array.sum(0), sums)


def _next(labels: Array) -> Array:
    """int32[B, T]: what each place has to predict; the last has nothing after it."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_LABEL)


def _sums(logits: Array, labels: Array) -> TokenLoss:
    """Of logits against labels at the same places."""
    supervised = labels != IGNORE_LABEL
    targets = jnp.where(supervised, labels, 0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return TokenLoss(
        loss=jnp.sum(loss * supervised),
        correct=jnp.sum((logits.argmax(-1) == targets) & supervised).astype(jnp.float32),
        count=jnp.sum(supervised).astype(jnp.float32),
    )
