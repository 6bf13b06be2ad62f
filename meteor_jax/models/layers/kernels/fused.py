"""Fused attention: cuDNN's on GPUs, Pallas' splash attention on TPUs.

B rows, T queries, S keys, H heads, K kv heads, d head width. What all take:
    q: float[B, T, H, d]; k, v: float[B, S, K, d]; v may have another d.
    mask: bool[B, T, S] or bool[B, 1, S], or None.
    segments: int32[B, T] and int32[B, S], or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from meteor_jax.models.layers.platform import target_platform
from meteor_jax.types import Array

LANES = 128  # of a TPU's vector registers; a splash block is so many entries or a multiple
BLOCKS = (512, 256, LANES)  # sizes of splash blocks, of queries and of keys
HALF = (jnp.bfloat16, jnp.float16)  # what cuDNN's attention computes in


def cudnn_takes(q: Array, k: Array, v: Array) -> bool:
    """Whether cuDNN has a kernel for such arrays on this machine."""
    half = any(q.dtype == k.dtype == v.dtype == dtype for dtype in HALF)
    return half and _cudnn_width(q, v) <= largest_cudnn_width()


def splash_takes(q: Array, k: Array, *, mask: Array | None) -> bool:
    """Whether splash attention is worth it for such arrays, and can mask them."""
    by_key = mask is None or mask.shape[1] == 1
    return by_key and min(q.shape[1], k.shape[1]) >= LANES


def split_over_mesh(run: Callable[..., Array], q: Array, k: Array, v: Array, *by_row: Any) -> Array:
    """`run(q, k, v, *by_row)` on every device's own rows and heads: XLA cannot split a kernel.

    Axes of the mesh that do not divide rows, or heads, do the same work more than once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return run(q, k, v, *by_row)
    num_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = None if q.shape[0] % num_shards else ("data", "fsdp")
    heads = None if math.gcd(q.shape[2], k.shape[2]) % mesh.shape["tensor"] else "tensor"
    by_head, rows = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    return jax.shard_map(
        run, in_specs=(by_head,) * 3 + (rows,) * len(by_row), out_specs=by_head, check_vma=False
    )(q, k, v, *by_row)


def join_masks(mask: Array | None, segments: tuple[Array, Array] | None) -> Array | None:
    """bool[B, T, S] or bool[B, 1, S] of both; None where there is neither."""
    if segments is None:
        return mask
    own = segments[0][:, :, None] == segments[1][:, None]
    return own if mask is None else own & mask


def _pad(array: Array, size: int, *, axis: int, value: Any = 0) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths, constant_values=value)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _cudnn_width(q: Array, v: Array) -> int:
    """The width that queries, keys and values share in cuDNN: a multiple of 8."""
    return _round_up(max(q.shape[-1], v.shape[-1]), 8)


def largest_cudnn_width() -> int:
    """The widest head that cuDNN's attention takes on this machine; 0 where it cannot run."""
    capability = getattr(jax.devices()[0], "compute_capability", "")  # such as "9.0"
    major = capability.partition(".")[0]
    if not major.isdigit() or int(major) < 8:
        return 0
    return 256 if int(major) >= 9 else 128


def attend_cudnn(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    segments: tuple[Array, Array] | None,
    *,
    causal: bool,
    scale: float,
) -> Array:
    """float[B, T, H, d] by cuDNN, everything padded to what it wants."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    head_dim, width = v.shape[-1], _cudnn_width(q, v)
    q, k, v = (_pad(array, width, axis=-1) for array in (q, k, v))
    mask = join_masks(mask, segments)
    if mask is not None:
        # Trained under a mask, cuDNN wants even lengths, and the mask whole.
        even = _round_up(num_queries, 2), _round_up(num_keys, 2)
        q, k, v = _pad(q, even[0], axis=1), _pad(k, even[1], axis=1), _pad(v, even[1], axis=1)
        mask = jnp.broadcast_to(mask, (mask.shape[0], num_queries, num_keys))
        mask = _pad(_pad(mask, even[0], axis=1), even[1], axis=2)[:, None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, scale=scale, implementation="cudnn"
    )
    return out[:, :num_queries, :, :head_dim]


def attend_splash(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    segments: tuple[Array, Array] | None,
    *,
    causal: bool,
    scale: float,
) -> Array:
    """float[B, T, H, d] by splash attention, which skips what lies above the diagonal; lengths
    are padded to whole blocks, and keys that nobody sees are segments of their own."""
    num_queries, num_heads = q.shape[1:3]
    num_keys = k.shape[1]
    block_q, block_kv = _block(num_queries), _block(num_keys)
    padded = _round_up(num_queries, block_q), _round_up(num_keys, block_kv)
    ids = None
    if mask is not None or segments is not None or padded != (num_queries, num_keys):
        of_q, of_k = segments or (jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k))
        if mask is not None:
            of_k = jnp.where(mask[:, 0], of_k, -1)
        ids = splash.SegmentIds(
            q=_pad(of_q, padded[0], axis=1, value=-1), kv=_pad(of_k, padded[1], axis=1, value=-1)
        )
    q, k, v = (
        _pad(array.swapaxes(1, 2), size, axis=2)
        for array, size in (
            (q * jnp.asarray(scale, q.dtype), padded[0]),
            (k, padded[1]),
            (v, padded[1]),
        )
    )
    seen = splash.CausalMask(padded) if causal else splash.FullMask(padded)
    run = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([seen] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        residual_checkpoint_name="attention",
        interpret=target_platform() == "cpu",
    )
    out = jax.vmap(run)(q, k, v, ids)
    return out[:, :, :num_queries].swapaxes(1, 2)


def _block(length: int) -> int:
    """The largest block that fills up `length` entries by an eighth at most."""
    return next((b for b in BLOCKS if _round_up(length, b) <= 1.125 * length), LANES)
