"""Attention: one function over three kernels, and the attention that keys receive.

B rows, T queries, S keys, H heads, K kv heads, d head width.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Generator
from typing import Literal

import jax
import jax.numpy as jnp

from meteor_jax.models.layers.kernels import cpu
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
QUERY_CHUNK = 256  # query rows of one attention map that `attention_received` holds at a time

_AUTO: contextvars.ContextVar[Kernel] = contextvars.ContextVar("attention_kernel", default="auto")


@contextlib.contextmanager
def attention_kernel(kernel: Kernel) -> Generator[None]:
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
        by_platform: dict[str, Kernel] = {"gpu": "cudnn", "tpu": "splash"}
        kernel = by_platform.get(target_platform(), "xla")
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
    if target_platform() == "cpu":
        out = cpu.attend(q, k, v, bias, causal=causal, masked=mask is not None)
    else:
        logits = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(v.dtype)
        out = jnp.einsum("bkgts,bksd->bkgtd", weights, v, preferred_element_type=jnp.float32)
        out = out.astype(v.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, num_queries, num_heads, v.shape[-1])


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
