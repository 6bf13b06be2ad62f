"""Attention: one function over three kernels, and the attention that keys receive.

B rows, T queries, S keys, H heads, K kv heads, d head width.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from meteor_jax.models.layers.kernels.fused import (
    attend_cudnn,
    attend_splash,
    cudnn_takes,
    join_masks,
    splash_takes,
    split_over_mesh,
)
from meteor_jax.models.layers.platform import target_platform
from meteor_jax.models.layers.remat import save_as
from meteor_jax.types import Array

Kernel = Literal["auto", "xla", "cudnn", "splash"]

MASKED = -1e30  # a score that softmax turns into exactly 0 in float32, without NaN in empty rows
CPU_CHUNK = 256  # query rows of one attention map that stays in a CPU's cache
CAUSAL_CHUNK = 128  # query rows of one causal map on a CPU: fewer compute less that nobody may see
QUERY_CHUNK = 256  # query rows of one attention map that `attention_received` holds at a time

_AUTO: contextvars.ContextVar[Kernel] = contextvars.ContextVar("attention_kernel", default="auto")


@contextlib.contextmanager
def attention_kernel(kernel: Kernel) -> Iterator[None]:
    """Every `attend` that is traced in this context, and does not name a kernel, takes `kernel`.

    A function that `jax.jit` has traced keeps the kernel that it was traced with.
    """
    token = _AUTO.set(kernel)
    try:
        yield
    finally:
        _AUTO.reset(token)


def select_kernel(
    q: Array, k: Array, v: Array, *, mask: Array | None = None, kernel: Kernel = "auto"
) -> Literal["xla", "cudnn", "splash"]:
    """The kernel that `attend` takes for such arrays; see there."""
    if kernel == "auto":
        kernel = _AUTO.get()
    if kernel == "auto":
        kernel = {"gpu": "cudnn", "tpu": "splash"}.get(target_platform(), "xla")
    if kernel == "cudnn" and cudnn_takes(q, k, v):
        return "cudnn"
    if kernel == "splash" and splash_takes(q, k, mask=mask):
        return "splash"
    return "xla"


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    mask: Array | None = None,
    segments: tuple[Array, Array] | None = None,
    scale: float | None = None,
    kernel: Kernel = "auto",
) -> Array:
    """Softmax attention, float32 softmax.

    With `causal`, query t sees keys 0..t: packed sequences need no other mask, because their
    invalid entries stand last. What a query that sees no key gets is finite and means nothing.

    The kernel is cuDNN's on GPUs and Pallas' splash attention on TPUs, each device of the mesh in
    force working on its own rows and heads, and XLA's elsewhere and wherever they cannot run:
      - cuDNN: other dtypes than bfloat16 and float16; heads wider than 256, or 128 before Hopper;
        GPUs before Ampere, or not NVIDIA's.
      - splash: fewer than 128 queries or keys; a mask that differs from query to query.

    Shapes:
        q: float[B, T, H, d]; k, v: float[B, S, K, d], H a multiple of K; v may have another d.
        mask: bool[B, T, S] or bool[B, 1, S], True where a query may look.
        segments: int32[B, T] and int32[B, S], 0 or more; a query sees keys of its own segment.
        returns: float[B, T, H, d], with the d of v.

    Args:
        scale: of the products, default d**-0.5.
        kernel: "auto" is the platform's that the program is traced for, or `attention_kernel`'s.
            "splash" on a CPU is interpreted: slow, for tests.
    """
    kernel = select_kernel(q, k, v, mask=mask, kernel=kernel)
    q, k, v = (save_as("qkv", array) for array in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if kernel == "xla":
        out = _attend_xla(q, k, v, join_masks(mask, segments), causal=causal, scale=scale)
        return save_as("attention", out)
    fused = attend_cudnn if kernel == "cudnn" else attend_splash
    run = functools.partial(fused, causal=causal, scale=scale)
    out = split_over_mesh(run, q, k, v, mask, segments)
    return out if kernel == "splash" else save_as("attention", out)  # splash names its own


def _attend_xla(
    q: Array, k: Array, v: Array, mask: Array | None, *, causal: bool, scale: float
) -> Array:
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv = k.shape[2]
    # One batched product a (row, kv head): on CPUs twice as fast as the five-axis einsum.
    q = q.reshape(batch, num_queries, num_kv, num_heads // num_kv, head_dim)
    q = q.transpose(0, 2, 3, 1, 4) * jnp.asarray(scale, q.dtype)
    bias = jnp.zeros((1, 1))
    if causal:
        bias = jnp.where(jnp.tril(jnp.ones((num_queries, k.shape[1]), bool)), 0.0, MASKED)
    if mask is not None:
        bias = bias + jnp.where(mask[:, None, None], 0.0, MASKED)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if target_platform() != "cpu":
        weights = jax.nn.softmax(_scores(q, k) + bias, axis=-1)
        out = _values(weights.astype(v.dtype), v).astype(v.dtype)
    elif mask is None and not causal and num_queries > CPU_CHUNK:
        out = _in_chunks(q, k, v, bias)
    elif mask is None and causal and CAUSAL_CHUNK < num_queries == k.shape[2]:
        out = _causal_in_chunks(q, k, v, bias)
    else:
        out = _weighted_values(q, k, v, bias)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, num_queries, num_heads, v.shape[-1])


def _causal_in_chunks(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """`_weighted_values` a chunk of queries at a time, over the keys that these can see alone."""
    chunks = []
    for start in range(0, q.shape[3], CAUSAL_CHUNK):
        stop = min(start + CAUSAL_CHUNK, q.shape[3])
        chunks.append(
            _weighted_values(
                q[..., start:stop, :], k[..., :stop, :], v[..., :stop, :], bias[start:stop, :stop]
            )
        )
    return jnp.concatenate(chunks, axis=3)


def _in_chunks(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """`_weighted_values` a head and a chunk of queries at a time: such a part of the map stays in
    a CPU's cache, which takes a third of the time of the whole map."""
    batch, num_kv, groups, num_queries, head_dim = q.shape
    rows = max(n for n in range(1, CPU_CHUNK + 1) if groups * num_queries % n == 0)
    if rows < CPU_CHUNK // 4:  # too small products
        return _weighted_values(q, k, v, bias)
    q = q.reshape(batch * num_kv, -1, rows, head_dim)
    k, v = (array.reshape(-1, *array.shape[2:]) for array in (k, v))

    def head(arrays: tuple[Array, Array, Array]) -> Array:
        q, k, v = arrays
        k, v = k[None, None], v[None, None]

        def chunk(q: Array) -> Array:
            return _weighted_values(q[None, None, None], k, v, bias)[0, 0, 0]

        return jax.lax.map(chunk, q)

    out = jax.lax.map(head, (q, k, v))
    return out.reshape(batch, num_kv, groups, num_queries, -1)


@jax.custom_jvp
def _weighted_values(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """softmax(q·k + bias)·v for float[B, K, G, T, d] and float[B, K, S, d]; no derivative by the
    bias."""
    return _mix(q, k, v, bias)[0]


def _mix(q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, Array, Array]:
    """The result, and the weights before they are divided by their float32 sums."""
    logits = _scores(q, k) + bias
    weight = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = weight.sum(-1, keepdims=True)
    weight = weight.astype(v.dtype)
    return (_values(weight, v) / total).astype(v.dtype), weight, total


def _scores(q: Array, k: Array) -> Array:
    return jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)


def _values(weight: Array, v: Array) -> Array:
    return jnp.einsum("bkgts,bksd->bkgtd", weight, v, preferred_element_type=jnp.float32)


@_weighted_values.defjvp
def _weighted_values_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # What a change of the scores moves is ∂o = Σ_s p·∂s·v − (Σ_s p·∂s)·o. Written so, the backward
    # pass takes Σ_d o·∂o where that of a softmax sums over the map (FlashAttention).
    q, k, v, bias = primals
    dq, dk, dv, _ = tangents
    out, weight, total = _mix(q, k, v, bias)
    moved = weight * (_scores(dq, k) + _scores(q, dk))
    change = _values(moved, v) - moved.sum(-1, keepdims=True) * out + _values(weight, dv)
    return out, (change / total).astype(v.dtype)


def attend_cached(q: Array, k: Array, v: Array, cache: tuple[Array, Array, Array]) -> Array:
    """Attention of new entries to a cache and, causally, to themselves.

    The two parts share one softmax but are never concatenated: a decoded token reads the cache
    once and copies nothing.

    Shapes:
        q: float[B, T, H, d]; k, v: float[B, T, K, d]; cache: k, v float[B, S, K, d], valid
            bool[B, S].
        returns: float[B, T, H, d].
    """
    cached_k, cached_v, valid = cache
    batch, num_new, num_heads, head_dim = q.shape
    q = q.reshape(batch, num_new, k.shape[2], -1, head_dim) * jnp.asarray(head_dim**-0.5, q.dtype)

    def scores(keys: Array) -> Array:
        return jnp.einsum("btkgd,bskd->bkgts", q, keys, preferred_element_type=jnp.float32)

    old = jnp.where(valid[:, None, None, None], scores(cached_k), MASKED)
    new = jnp.where(jnp.tril(jnp.ones((num_new, num_new), bool)), scores(k), MASKED)
    weights = jax.nn.softmax(jnp.concatenate([old, new], axis=-1), axis=-1).astype(v.dtype)
    old, new = jnp.split(weights, [cached_k.shape[1]], axis=-1)
    # In this order of axes CPUs copy the cached values row by row; in that of the result they
    # transpose them, which takes longer than all the rest.
    out = jnp.einsum("bkgts,bskd->bkgtd", old, cached_v)
    out += jnp.einsum("bkgts,bskd->bkgtd", new, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, num_new, num_heads, head_dim)


def attention_received(
    q: Array,
    k: Array,
    *,
    row_weight: Array,
    mask: Array | None = None,
    scale: float | None = None,
) -> Array:
    """The attention that each key gets from a weighted mean of query rows, head by head.

    The softmax runs over all keys, so the mass on a part of them is not renormalised. The map is
    built `QUERY_CHUNK` rows at a time and never stored. No gradient flows through it.

    Shapes:
        q: float[B, T, H, d]; k: float[B, S, K, d].
        row_weight: float[B, T]; rows are averaged with these weights (all 0 gives 0).
        mask: bool[B, T, S], True where a query may look.
        returns: float32[B, H, S].
    """
    q, k = jax.lax.stop_gradient((q, k))
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    weight = row_weight.astype(jnp.float32)
    weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-9)
    q = q.reshape(batch, num_queries, num_kv, num_heads // num_kv, head_dim)

    def received(q: Array, weight: Array, mask: Array | None) -> Array:
        logits = jnp.einsum("btkgd,bskd->bkgts", q * scale, k, preferred_element_type=jnp.float32)
        if mask is not None:
            logits = jnp.where(mask[:, None, None], logits, MASKED)
        return jnp.einsum("bkgts,bt->bkgs", jax.nn.softmax(logits, axis=-1), weight)

    total = jnp.zeros((batch, num_kv, num_heads // num_kv, k.shape[1]), jnp.float32)
    for start in range(0, num_queries, QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        total += received(q[:, rows], weight[:, rows], None if mask is None else mask[:, rows])
    return total.reshape(batch, num_heads, k.shape[1])
