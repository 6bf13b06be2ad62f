"""`Method`: what a pruning method is to a model, and what passes between the two.

A method is a frozen dataclass of its options whose functions are pure functions of arrays. A model
calls it at a reduction point, and applies what it returns:

    ranking = method.rank(x, context=context)              # the larger a score, the better
    reduction = method.select(x, ranking.scores, context=context)

B rows (images or examples), N tokens, K kept tokens, D width, S entries of a packed sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.struct
import jax.numpy as jnp

from meteor_jax.pruning.ops.select import Selection, keep_in_windows, keep_topk
from meteor_jax.pruning.points import Stage
from meteor_jax.types import Array, Sequence


@dataclasses.dataclass(frozen=True)
class Span:
    """One encoder's tokens among all joined ones: `[start, start + size)`. Static.

    Attributes:
        grid: side of the encoder's full output grid, which pooling needs.
    """

    encoder: str
    start: int
    size: int
    grid: int

    def of(self, x: Array) -> Array:
        """The encoder's part of `x`, [B, N, ...]."""
        return x[:, self.start : self.start + self.size]


def _static(default: Any) -> Any:
    return flax.struct.field(pytree_node=False, default=default)


def _promised() -> Any:
    """None by default, but declared with the type that a method can rely on where it is promised,
    so that type checkers ask no method for a test of it."""
    return flax.struct.field(default=None)


class ReductionContext(flax.struct.PyTreeNode):
    """What a model knows at a reduction point. A field is None unless the point has it and the
    method's `needs` name it; the fields marked (always) are there wherever the point has them.

    Static:
        keep: tokens of one image that the step leaves (always).
        available: tokens of one image that reach the step (always).
        index: number of the step among those of its stage, from 0 (always); in an encoder that of
            the segment, or the block.
        encoder: name of the encoder; "" at fusion and in the decoder.
        window_sizes: how many of the N tokens are in each attention window, one window after the
            other; () where an encoder has none.
        spans: at fusion, which tokens are whose (always).
        num_text, max_images, capacity: in the decoder, text places of a row, the most images, and
            the most visual tokens that a row can be left with (always).

    Shapes:
        image_seed: uint32[B]; a hash of each image (always in encoders and at fusion).
        patch_index: int32[B, N]; place of each token in its encoder's grid (likewise).
        attention_received: float32[B, N] in an encoder, mean over heads and queries; in the
            decoder float32[B, H, S], of the queries that `Method.query_weights` asks for.
        cls_attention: float32[B, N]; the same from an encoder's CLS token alone.
        encoder_parts: at fusion="pre", by encoder float[B, N, D]: what its channels contribute to
            the projector's first layer.
        keys: float[B, S, heads, d]; keys of the layer before the step.
        sequence: in the decoder, the packed row (always).
        num_images: int32[B]; images of each row (always, in the decoder).
        num_kept: int32[B]; visual tokens that each row is to keep, once the budget has set it.
        sizes: float32[B, N]; how many tokens each one stands for, where an earlier step merged.
        state: what the method returned at the step before, or from `Method.begin`.
        learned: by name, the parameters of the model's learned methods (always).
    """

    image_seed: Array = _promised()
    patch_index: Array = _promised()
    attention_received: Array = _promised()
    cls_attention: Array = _promised()
    encoder_parts: tuple[Array, ...] = _promised()
    keys: Array = _promised()
    sequence: Sequence = _promised()
    num_images: Array = _promised()
    num_kept: Array = _promised()
    sizes: Array | None = None
    state: Any = None
    learned: Mapping[str, Any] | None = None
    keep: int = _static(0)
    available: int = _static(0)
    index: int = _static(0)
    encoder: str = _static("")
    window_sizes: tuple[int, ...] = _static(())
    spans: tuple[Span, ...] = _static(())
    num_text: int = _static(0)
    max_images: int = _static(0)
    capacity: int = _static(0)

    def params_of(self, method: Method) -> Any:
        """The parameters of a learned method.

        Raises:
            ValueError: if the model has none for it.
        """
        learned = self.learned or {}
        if method.name not in learned:
            raise ValueError(
                f"method '{method.name}' has parameters of its own: name it in "
                "model.learned_methods."
            )
        return learned[method.name]

    def keep_best(self, scores: Array, *, always: Array | None = None) -> Selection:
        """The best of float[B, N] by the rules of the point: as many as the budget allows, each
        window's quota, and all text, in their original order.

        Args:
            always: bool[B, N]; tokens that are kept whatever their score.
        """
        if self.sequence is None:
            if len(self.window_sizes) > 1:
                return keep_in_windows(scores, keep=self.keep, sizes=self.window_sizes)
            return keep_topk(scores, keep=self.keep, always=always)
        is_text = self.sequence.is_text
        return keep_topk(
            scores,
            keep=min(self.num_text + self.capacity, scores.shape[1]),
            valid=self.sequence.valid,
            always=is_text if always is None else is_text | always,
            num_keep=is_text.sum(1) + self.num_kept,
        )


class Ranking(flax.struct.PyTreeNode):
    """Shapes:
    scores: float[B, N]; the larger, the better. No gradient flows through a choice.
    budget_signal: float32[B], or None; what an adaptive budget multiplies with λ.
    """

    scores: Array
    budget_signal: Array | None = None


class Reduction(flax.struct.PyTreeNode):
    """The tokens that a step leaves.

    Shapes:
        x: float[B, K, D].
        idx: int32[B, K]; which of the tokens each one was, increasing.
        valid: bool[B, K]; invalid entries are last.
        sizes: float32[B, K] or None; how many tokens each one stands for.
        state: of any form; the method's next step and `restore` get it.
        loss: float32[B] or None; a term of the training loss, before the decoder: its mean over
            images is added.
    """

    x: Array
    idx: Array
    valid: Array
    sizes: Array | None = None
    state: Any = None
    loss: Array | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of every method: override what the method does, and register it (`registry.register`).

    Attributes:
        name: under which it is registered.
        stages: where it can act: "encode", "fuse", "decode".
        needs: fields of the context that cost something to compute.
        restores: its `state` gives all tokens back at the end of the encoder (`restore`), and
            before attention of every block that it acts in.
        in_training: whether its steps in the decoder act in training too.
        score_layer, rotary: of which layer the decoder's `attention_received` is (the one before
            the step, "previous", or after it, "next"), and whether queries and keys are rotated.
    """

    name: ClassVar[str] = ""
    stages: ClassVar[tuple[Stage, ...]] = ("encode", "fuse", "decode")
    restores: ClassVar[bool] = False
    in_training: ClassVar[bool] = False
    score_layer = "previous"
    rotary = "with"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def scores(self, x: Array, *, context: ReductionContext) -> Array | Ranking:
        """float[B, N] of tokens float[B, N, D]: tokens with larger scores are kept first."""
        raise NotImplementedError(f"method '{self.name}' defines no scores.")

    def rank(self, x: Array, *, context: ReductionContext) -> Ranking:
        """`scores` as a `Ranking`."""
        scores = self.scores(x, context=context)
        return scores if isinstance(scores, Ranking) else Ranking(scores)

    def select(self, x: Array, scores: Array, *, context: ReductionContext) -> Reduction:
        """The tokens that are kept, and their values; by default the best tokens, unchanged."""
        return gather(x, context.keep_best(scores))

    def reduce(self, x: Array, *, context: ReductionContext) -> Reduction:
        """Ranks and selects, for points with a static budget."""
        return self.select(x, self.rank(x, context=context).scores, context=context)

    def restore(self, x: Array, *, state: Any) -> Array:
        """float[B, N, D]: all tokens again, from the float[B, K, D] that are left of them."""
        raise NotImplementedError(f"method '{self.name}' restores nothing.")

    def begin(self, *, context: ReductionContext) -> Any:
        """State that every step of this method in the decoder finds in its context: computed once,
        from the row that enters the first layer."""
        return None

    def query_weights(self, *, context: ReductionContext) -> Array:
        """float32[B, S]: whose attention the decoder's `attention_received` averages."""
        return text_after_image(context.sequence).astype(jnp.float32)

    def max_queries(self, num_text: int) -> int:
        """The largest number of entries where `query_weights` is not 0."""
        return num_text

    def init_params(self, key: Array, *, widths: Mapping[str, int]) -> Any:
        """Parameters of its own, as a dict of arrays, for a method that a model config lists in
        `learned_methods`.

        Args:
            widths: token widths by part of the model: an encoder's name, "fusion", "decoder".
        """
        raise NotImplementedError(f"method '{self.name}' has no parameters.")


def gather(x: Array, selection: Selection) -> Reduction:
    """The selected tokens of float[B, N, D], as they are."""
    kept = jnp.take_along_axis(x, selection.idx[..., None], axis=1, mode="promise_in_bounds")
    return Reduction(x=kept, idx=selection.idx, valid=selection.valid)


def text_after_image(sequence: Sequence) -> Array:
    """bool[B, S]: the text entries that follow a row's last visual token."""
    place = jnp.arange(sequence.valid.shape[1])
    last_visual = jnp.max(jnp.where(sequence.is_visual, place, -1), axis=1, keepdims=True)
    return sequence.is_text & (place > last_visual)


def last_text(sequence: Sequence) -> Array:
    """bool[B, S]: the last text entry of each row."""
    place = jnp.arange(sequence.valid.shape[1])
    return place == jnp.max(jnp.where(sequence.is_text, place, -1), axis=1, keepdims=True)


def add_losses(*losses: Array | None) -> Array | None:
    """The sum of those that are not None."""
    present = [loss for loss in losses if loss is not None]
    return sum(present[1:], start=present[0]) if present else None
