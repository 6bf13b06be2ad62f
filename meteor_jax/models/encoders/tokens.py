"""An encoder's tokens between its blocks, what a plan's steps leave of them, and what comes out.

An encoder's forward pass asks `split_depth` where its plan reduces tokens, runs the blocks up to
there, and calls `prune_tokens`; without windows `run_segment` does both.

I images, P prefix tokens (a CLS), N tokens, K kept tokens, E encoder width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.models.layers.attention import attention_received
from meteor_jax.models.layers.stack import Stack
from meteor_jax.pruning.encoder_steps import EncoderStep
from meteor_jax.pruning.method import Method, ReductionContext, add_losses
from meteor_jax.pruning.ops.windows import window_order, window_quotas
from meteor_jax.types import Array

ATTENTION = frozenset({"attention_received", "cls_attention", "keys"})  # of a block's attention


class EncoderOutput(flax.struct.PyTreeNode):
    """The tokens of one encoder.

    Shapes:
        x: float[I, N, E].
        patch_index: int32[I, N]; row-major place of each token in the encoder's own output grid.
        kept: int32[I, K] a segment: the tokens left after it, in the same numbering; empty where
            the encoder ran without steps.
        features: float[I, K, E] a segment: what those tokens held there, where that was asked for.
            Its E is that of the blocks.
        loss: float32[I] or None; see `Reduction.loss`.
    """

    x: Array
    patch_index: Array
    kept: tuple[Array, ...] = ()
    features: tuple[Array, ...] = ()
    loss: Array | None = None


class EncoderTokens(flax.struct.PyTreeNode):
    """An encoder's tokens between two blocks.

    Shapes:
        x: float[I, P + N, E]; the first P are never dropped and do not come out.
        patch_index: int32[I, N]; as in `EncoderOutput`.
        sizes: float32[I, N] or None; how many tokens each one stands for.
        state: of a method that carries one from step to step.
        whole: int32[I, M]; the patch indices of all tokens that `restores` can give back.
        loss: float32[I] or None; what the steps so far add to the training loss.
        window_sizes: how many of the N are in each attention window, window after window (static);
            one number where the encoder has no windows.
        num_prefix: P (static).
        restores: the method that has reduced the tokens and can restore them (static).
    """

    x: Array
    patch_index: Array
    sizes: Array | None = None
    state: Any = None
    whole: Array | None = None
    loss: Array | None = None
    window_sizes: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    num_prefix: int = flax.struct.field(pytree_node=False, default=0)
    restores: Method | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def start(cls, x: Array, *, num_prefix: int = 0, window: int | None = None) -> EncoderTokens:
        """All tokens, float[I, P + N, E] in patch order. With a `window`, the side of an attention
        window in tokens, they are reordered window by window; P must be 0 then."""
        num_tokens = x.shape[1] - num_prefix
        order, sizes = np.arange(num_tokens), (num_tokens,)
        if window is not None:
            order, sizes = window_order(math.isqrt(num_tokens), window)
            x = x[:, order]
        patch_index = jnp.broadcast_to(jnp.asarray(order, jnp.int32), (x.shape[0], num_tokens))
        return cls(x=x, patch_index=patch_index, window_sizes=sizes, num_prefix=num_prefix)

    @property
    def num_tokens(self) -> int:
        return self.patch_index.shape[1]

    def restored(self) -> EncoderTokens:
        """All tokens again, where a method that restores them has reduced them."""
        if self.restores is None:
            return self
        x = self.restores.restore(self.x[:, self.num_prefix :], state=self.state)
        return self.replace(
            x=self._with_prefix(x),
            patch_index=self.whole,
            window_sizes=(x.shape[1],),
            sizes=None,
            restores=None,
        )

    def in_patch_order(self) -> tuple[Array, Array]:
        """float[I, N, E] without the prefix, and int32[I, N]."""
        x, patch_index = self.x[:, self.num_prefix :], self.patch_index
        if len(self.window_sizes) == 1:
            return x, patch_index
        order = jnp.argsort(patch_index, axis=1)
        return _take(x, order[..., None]), _take(patch_index, order)

    def _with_prefix(self, x: Array) -> Array:
        if not self.num_prefix:
            return x
        return jnp.concatenate([self.x[:, : self.num_prefix], x], axis=1)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Blocks `[start, stop)`, the steps inside them, and those after them.

    Attributes:
        number: of the encoder's three segments, the last that is over after it.
        last_block: the block whose attention a step after it asks for; of a segment without
            blocks, in an encoder of fewer blocks than segments, the next block (or the last).
    """

    start: int
    stop: int
    inside: tuple[EncoderStep, ...]
    after: tuple[EncoderStep, ...]
    number: int
    last_block: int


def split_depth(config: Any, steps: Sequence[EncoderStep], *, all_segments: bool) -> list[Segment]:
    """The blocks of an encoder, up to each segment's end at which the plan has a step.

    Args:
        config: an encoder's; see `TransformerSizes`.
        all_segments: stops at every segment's end.

    Raises:
        ValueError: for a step inside a block of an encoder that has no such points, or a block
            that there is not.
    """
    inside = [step for step in steps if step.point.kind == "block"]
    for step in inside:
        if not config.prunes_in_blocks or step.point.index >= config.depth:
            raise ValueError(
                f"no reduction point {step.point}: expected a block below "
                f"{config.depth if config.prunes_in_blocks else 0}; windowed encoders and ConvNeXt "
                "have none inside their blocks."
            )
    segments, start = [], 0
    for number, stop in enumerate(config.segment_ends, 1):
        after = tuple(s for s in steps if s.point.kind == "segment" and s.point.index == number)
        if after or all_segments or number == len(config.segment_ends):
            here = tuple(step for step in inside if start <= step.point.index < stop)
            last = min(max(start, stop - 1), config.segment_ends[-1] - 1)
            segments.append(Segment(start, stop, here, after, number, last))
            start = stop
    return segments


@jax.named_scope("scores")
def prune_tokens(
    tokens: EncoderTokens, step: EncoderStep, *, context: ReductionContext
) -> EncoderTokens:
    """The tokens that `step` leaves, in the order in which they were.

    Raises:
        ValueError: if the step keeps more than there are.
    """
    if not drops(step, tokens):
        return tokens
    is_segment = step.point.kind == "segment"
    context = context.replace(
        patch_index=tokens.patch_index,
        sizes=tokens.sizes,
        state=tokens.state,
        keep=step.keep,
        available=tokens.num_tokens,
        index=step.point.index - 1 if is_segment else step.point.index,
        encoder=step.point.part,
        window_sizes=tokens.window_sizes,
    )
    reduction = step.method.reduce(tokens.x[:, tokens.num_prefix :], context=context)
    restores, sizes = step.method if step.method.restores else None, reduction.sizes
    if sizes is None and tokens.sizes is not None:
        sizes = _take(tokens.sizes, reduction.idx)
    return tokens.replace(
        x=tokens._with_prefix(reduction.x),
        patch_index=_take(tokens.patch_index, reduction.idx),
        sizes=sizes,
        state=reduction.state,
        loss=add_losses(tokens.loss, reduction.loss),
        whole=tokens.patch_index if restores else None,
        window_sizes=window_quotas(step.keep, tokens.window_sizes),
        restores=restores,
    )


@jax.named_scope("scores")
def with_attention(
    context: ReductionContext,
    step: EncoderStep,
    tokens: EncoderTokens,
    *,
    blocks: Stack,
    block: int,
    x: Array,
    scale: float | None = None,
) -> ReductionContext:
    """`context` with what `step` needs of a block's attention, in an encoder without windows.

    Args:
        x: the block's input, float[I, P + N, E].
        scale: of the products of queries and keys, default d**-0.5.

    Raises:
        ValueError: if the block has dropped tokens since it attended.
    """
    needs = step.method.needs & ATTENTION
    if not needs or not drops(step, tokens):
        return context
    if x.shape[1] != tokens.x.shape[1]:
        raise ValueError(
            f"{step.point}: '{step.method.name}' asks for the attention of block {block}, inside "
            "of which tokens are dropped too; drop them in another block."
        )
    q, k = blocks.layer(block, x, method="query_key")
    rows = jnp.ones(q.shape[:2])
    found: dict[str, Array] = {}
    if "attention_received" in needs:
        found["attention_received"] = attention_received(q, k, row_weight=rows, scale=scale)
    if "cls_attention" in needs:
        rows = rows.at[:, 1:].set(0.0)
        found["cls_attention"] = attention_received(q, k, row_weight=rows, scale=scale)
    found = {name: received.mean(1)[:, tokens.num_prefix :] for name, received in found.items()}
    return context.replace(keys=k[:, tokens.num_prefix :], **found)


def run_segment(
    blocks: Stack,
    tokens: EncoderTokens,
    segment: Segment,
    *,
    context: ReductionContext,
    scale: float | None = None,
) -> EncoderTokens:
    """The blocks of a segment of an encoder without windows, and its steps: between attention and
    MLP of a block, and after the last."""
    start, last_input = segment.start, tokens.x
    for step in segment.inside:
        block = step.point.index
        tokens = tokens.replace(x=blocks(tokens.x, start=start, stop=block).x).restored()
        last_input, start = tokens.x, block + 1
        seen = with_attention(
            context, step, tokens, blocks=blocks, block=block, x=last_input, scale=scale
        )
        tokens = tokens.replace(x=blocks.layer(block, last_input, method="attend"))
        tokens = prune_tokens(tokens, step, context=seen)
        tokens = tokens.replace(x=blocks.layer(block, tokens.x, method="feed_forward"))
    out = blocks(tokens.x, start=start, stop=segment.stop)
    if segment.stop > start:
        last_input = out.last_input
    tokens = tokens.replace(x=out.x)
    for step in segment.after:
        seen = with_attention(
            context,
            step,
            tokens,
            blocks=blocks,
            block=segment.last_block,
            x=last_input,
            scale=scale,
        )
        tokens = prune_tokens(tokens, step, context=seen)
    return tokens


def drops(step: EncoderStep, tokens: EncoderTokens) -> bool:
    """Whether `step` can drop any of `tokens`."""
    return step.keep != tokens.num_tokens


def check_cls(steps: Sequence[EncoderStep], *, has_cls: bool, advice: str) -> None:
    """Raises ValueError where a step asks for the attention of a CLS token that there is not."""
    if not has_cls and any("cls_attention" in step.method.needs for step in steps):
        raise ValueError(f"queries='cls' asks for a CLS token: {advice}; or use queries='all'.")


def finish(passed: Sequence[tuple[Segment, EncoderTokens]], *, num_tokens: int) -> EncoderOutput:
    """What comes out after the last block, in patch order.

    Args:
        passed: the segments, and the tokens after each.
        num_tokens: that there are without a plan.
    """
    x, patch_index = passed[-1][1].restored().in_patch_order()
    loss = passed[-1][1].loss
    if len(passed) == 1 and not passed[0][0].after:
        return EncoderOutput(x=x, patch_index=patch_index, loss=loss)
    kept, features = [], []
    before = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), (x.shape[0], num_tokens))
    for segment, tokens in passed:
        there, left = tokens.in_patch_order()
        kept += [before] * (segment.number - len(kept) - 1) + [left]  # where no step was, all pass
        features.append(there)
        before = left
    return EncoderOutput(x, patch_index, kept=tuple(kept), features=tuple(features), loss=loss)


def _take(x: Array, idx: Array) -> Array:
    return jnp.take_along_axis(x, idx, axis=1, mode="promise_in_bounds")
