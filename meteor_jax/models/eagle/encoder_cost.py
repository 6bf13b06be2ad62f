"""What an encoder costs by closed formulas: operations of one image, 2 a multiply-add.

N tokens, E width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from meteor_jax.models.encoders.convnext.model import KERNEL, STEM, ConvNextConfig
from meteor_jax.models.encoders.eva02.model import Eva02Config
from meteor_jax.models.encoders.pix2struct.model import Pix2StructConfig
from meteor_jax.models.encoders.sam.model import GROUP, SamConfig
from meteor_jax.pruning.encode import EncoderCut
from meteor_jax.pruning.ops.windows import window_order, window_quotas


def encoder_flops(encoder: Any, cuts: tuple[EncoderCut, ...] | None) -> float:
    """Patch embedding, blocks and neck of one encoder; cut tokens leave at the segment ends."""
    if isinstance(encoder, ConvNextConfig):
        return _convnext_flops(encoder)
    if isinstance(encoder, SamConfig):
        return _sam_flops(encoder, cuts)
    gated = isinstance(encoder, (Pix2StructConfig, Eva02Config))
    total = 2.0 * encoder.num_tokens * encoder.patch_size**2 * 3 * encoder.width
    for blocks, sizes in _segments(encoder, cuts):
        for block in blocks:
            tokens, keys = _tokens_and_keys(encoder, block, sizes)
            total += block_flops(
                tokens,
                width=encoder.width,
                kv_width=encoder.width,
                mlp_dim=encoder.mlp_dim,
                num_matrices=3 if gated else 2,
                pairs=tokens * keys,
            )
    return total


def encoder_score_flops(encoder: Any, cuts: tuple[EncoderCut, ...] | None) -> float:
    """Queries, keys and attention recomputed where a cut asks for attention received, and what
    merging at the output costs."""
    if cuts is None:
        return 0.0
    total = _merge_flops(encoder, cuts)
    if isinstance(encoder, ConvNextConfig):
        return total
    for cut, (blocks, sizes) in zip(cuts, _segments(encoder, cuts), strict=True):
        if cut.criterion not in ("attention", "cls") or cut.keep == sum(sizes):
            continue
        block = blocks[-1] if blocks else min(blocks.start, encoder.depth - 1)
        if isinstance(encoder, SamConfig):
            total += _sam_score_flops(encoder, block, sizes)
        else:
            tokens, keys = _tokens_and_keys(encoder, block, sizes)
            total += 2.0 * tokens * encoder.width * 2 * encoder.width
            total += 2.0 * tokens * keys * (encoder.width + encoder.num_heads)
    return total


def _merge_flops(encoder: Any, cuts: tuple[EncoderCut, ...]) -> float:
    """Likeness of the dropped tokens to those that gather them, and their sums."""
    dropped = cuts[-2].keep - cuts[-1].keep
    width = GROUP**2 * encoder.block_width if isinstance(encoder, SamConfig) else encoder.width
    return 2 * 2.0 * dropped * cuts[-1].merged * width


def _segments(
    encoder: Any, cuts: tuple[EncoderCut, ...] | None
) -> Iterator[tuple[range, tuple[int, ...]]]:
    """The blocks of each segment, and how many tokens are in each of its attention windows."""
    sizes, start = (encoder.num_tokens,), 0
    if isinstance(encoder, Eva02Config):
        _, sizes = window_order(encoder.grid, encoder.window)
    elif isinstance(encoder, SamConfig):
        _, sizes = window_order(encoder.grid, encoder.window // GROUP)
    for boundary, stop in enumerate(encoder.segment_ends):
        yield range(start, stop), sizes
        sizes, start = window_quotas(cuts[boundary].keep, sizes) if cuts else sizes, stop


def _tokens_and_keys(encoder: Any, block: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """A block's tokens, and how many of them each attends to; windows are equal here."""
    tokens = sum(sizes) + int(getattr(encoder, "keep_cls", False))
    if len(sizes) == 1 or block in encoder.global_blocks:
        return tokens, tokens
    return tokens, sizes[0]


def block_flops(
    tokens: float,
    *,
    width: int,
    kv_width: int,
    mlp_dim: int,
    num_matrices: int,
    pairs: float,
) -> float:
    """One transformer block: projections and MLP of its tokens, and as many pairs of attention."""
    projections = width * (2 * width + 2 * kv_width)
    return 2.0 * tokens * (projections + num_matrices * width * mlp_dim) + 4.0 * pairs * width


def _sam_flops(encoder: SamConfig, cuts: tuple[EncoderCut, ...] | None) -> float:
    width, heads, inner = encoder.block_width, encoder.num_heads, GROUP**2
    total = 2.0 * inner * encoder.num_tokens * encoder.patch_size**2 * 3 * width
    for blocks, sizes in _segments(encoder, cuts):
        for block in blocks:
            windows, slots, side = _sam_windows(encoder, block, sizes)
            total += 2.0 * windows * slots * (3 * width**2 + 2 * side * width)
            total += 2.0 * windows * slots**2 * (2 * width + 2 * side * heads)
            total += 2.0 * inner * sum(sizes) * (width**2 + 2 * width * encoder.mlp_dim)
    kept = cuts[-1].keep if cuts else encoder.num_tokens
    return total + 2.0 * inner * kept * width * encoder.neck_width


def _sam_score_flops(encoder: SamConfig, block: int, sizes: tuple[int, ...]) -> float:
    width, heads = encoder.block_width, encoder.num_heads
    windows, slots, side = _sam_windows(encoder, block, sizes)
    total = 2.0 * windows * slots * (3 * width**2 + 2 * side * width)
    return total + 2.0 * windows * slots**2 * (width + 2 * side * heads + heads)


def _sam_windows(encoder: SamConfig, block: int, sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """Windows of a block, slots of a window, rows of a window; `sizes` count groups."""
    if block in encoder.global_blocks:
        return 1, GROUP**2 * sum(sizes), GROUP * encoder.grid
    whole = sum(sizes) == encoder.num_tokens
    slots = encoder.window**2 if whole else GROUP**2 * max(sizes)
    return len(sizes), slots, encoder.window


def _convnext_flops(encoder: ConvNextConfig) -> float:
    side = encoder.image_size // STEM
    total = 2.0 * side**2 * STEM**2 * 3 * encoder.widths[0]
    for stage, (depth, width) in enumerate(zip(encoder.depths, encoder.widths, strict=True)):
        if stage:
            side //= 2
            total += 2.0 * side**2 * 4 * encoder.widths[stage - 1] * width
        total += depth * 2.0 * side**2 * (KERNEL**2 * width + 8 * width**2)
    return total
