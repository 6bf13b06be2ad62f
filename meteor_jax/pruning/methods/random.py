"""Control: tokens drawn at random. They depend on the image and the seed, never on the batch."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import jax.numpy as jnp

from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.method import Method, ReductionContext
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.points import FUSION
from meteor_jax.pruning.registry import preset, register
from meteor_jax.types import Array


@register("random")
@dataclasses.dataclass(frozen=True)
class Random(Method):
    """A draw that differs from image to image, from encoder to encoder and from step to step. In
    the decoder it depends on the seed and the step alone."""

    seed: int = 0

    def scores(self, x: Array, *, context: ReductionContext) -> Array:
        if context.sequence is not None:
            # By visual index, not by place, so that padding does not change what is drawn.
            key = jax.random.fold_in(jax.random.key(self.seed), context.index)
            table = jax.random.uniform(key, (x.shape[1],))
            return table[jnp.maximum(context.sequence.visual, 0)]
        seed = self.seed
        if context.encoder:
            seed = zlib.crc32(f"{self.seed} {context.encoder} {context.index}".encode())
        if context.image_seed is None:
            raise ValueError("method 'random' draws by the image and needs image_seed.")
        return random_scores(context.image_seed, seed=seed, num_tokens=x.shape[1])


def random_scores(image_seed: Array, *, seed: int, num_tokens: int) -> Array:
    """float32[B, N]: a draw that depends on uint32[B], a hash of each image, and on `seed` alone,
    never on what else is in the batch."""
    key = jax.random.key(seed)

    def draw(image: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, image), (num_tokens,))

    return jax.vmap(draw)(image_seed)


@preset
def random(*, keep: int, seed: int = 0) -> PrunePlan:
    """`keep` random tokens at fusion."""
    return PrunePlan("random", (Step(FUSION, Random(seed), Fixed(keep)),))
