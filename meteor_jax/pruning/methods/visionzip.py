"""VisionZip (CVPR 2025, arXiv 2412.04467): at each encoder's end the tokens that are looked at most
stay, and a few average the rest."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.pruning.budgets import Shared
from meteor_jax.pruning.method import Reduction, ReductionContext
from meteor_jax.pruning.methods.attention_received import AttentionReceived
from meteor_jax.pruning.ops.merge import mean_of_clusters
from meteor_jax.pruning.ops.select import keep_topk
from meteor_jax.pruning.ops.similarity import finite_tokens, unit_tokens
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.points import NUM_SEGMENTS, after_segment
from meteor_jax.pruning.registry import preset, register
from meteor_jax.types import Array


@preset
def visionzip(*, keep: int, merged: float = 10 / 64) -> PrunePlan:
    """VisionZip: before each encoder's projector; a share of `keep` averages the rest, 10 of 64 as
    in the paper.

    Our reading, for several encoders without a CLS token: each keeps its share of `keep`, by how
    many tokens it has; attention received from all tokens in the last block stands for that of the
    CLS token (ConvNeXt: least like the mean token); likeness is the cosine of features, not of
    keys; and tokens stay in patch order. Needs post-projection fusion.
    """
    budget = Shared(keep, assignment="tokens")
    step = Step(after_segment(NUM_SEGMENTS), VisionZip(merge_share=merged), budget)
    return PrunePlan("visionzip", (step,))


@register("visionzip")
@dataclasses.dataclass(frozen=True)
class VisionZip(AttentionReceived):
    """`AttentionReceived`, and a merge of what it drops. Attention windows have no quotas then, so
    it is for an encoder's end.

    Attributes:
        merge_share: share of the tokens left that gather what is dropped.
    """

    merge_share: float = 10 / 64

    def __post_init__(self) -> None:
        if not 0 <= self.merge_share < 1:
            raise ValueError(f"merge_share: expected a share below 1, got {self.merge_share}.")

    def num_merge_targets(self, keep: int) -> int:
        """How many of `keep` tokens gather the rest. One token at least is chosen by its score."""
        return min(round(self.merge_share * keep), keep - 1)

    def select(self, x: Array, scores: Array, *, context: ReductionContext) -> Reduction:
        num_merge_targets = self.num_merge_targets(context.keep)
        if not num_merge_targets:
            return super().select(x, scores, context=context)
        scores = jax.lax.stop_gradient(scores)
        x, idx = merge_rest(x, scores, keep=context.keep, num_merge_targets=num_merge_targets)
        return Reduction(x=x, idx=idx, valid=jnp.ones(idx.shape, bool))


def merge_rest(
    x: Array, scores: Array, *, keep: int, num_merge_targets: int
) -> tuple[Array, Array]:
    """Dominant tokens, and a few that gather the rest, as VisionZip (CVPR 2025, 2412.04467) does.

    The `keep - num_merge_targets` tokens with the largest scores stay as they are. Of the
    rest, `num_merge_targets` at even strides become targets; every other one goes to the target
    that it is most like, and their mean is added to that target.

    Shapes:
        x: float[B, N, D], keep < N; scores: float[B, N].
        returns: float[B, keep, D], and int32[B, keep], the places they had, increasing.
    """
    num_tokens = x.shape[1]
    dominant = keep_topk(scores, keep=keep - num_merge_targets).idx
    is_rest = jnp.ones(x.shape[:2], bool)
    is_rest = jax.vmap(lambda row, idx: row.at[idx].set(False))(is_rest, dominant)
    rest = keep_topk(is_rest, keep=num_tokens - keep + num_merge_targets).idx
    strided = rest.shape[1] // num_merge_targets * np.arange(num_merge_targets)
    targets, others = rest[:, strided], jnp.delete(rest, strided, axis=1)

    def of(idx: Array, array: Array = x) -> Array:
        return jnp.take_along_axis(array, idx[..., None], axis=1)

    unit, finite = unit_tokens(x), finite_tokens(x)[..., None]
    similarity = jnp.einsum("bnd,bkd->bnk", of(others, unit), of(targets, unit))
    target = jnp.where(of(others, finite)[..., 0], similarity.argmax(-1), num_merge_targets)
    mean = mean_of_clusters(of(others), target, num_clusters=num_merge_targets)
    itself = jnp.where(of(targets, finite), of(targets), 0)
    places = jnp.concatenate([dominant, targets], axis=1)
    kept = jnp.concatenate([of(dominant), itself + mean], axis=1)
    order = jnp.argsort(places, axis=1)
    return of(order, kept), jnp.take_along_axis(places, order, axis=1)
