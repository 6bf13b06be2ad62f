"""What the model's methods return.

B examples, I images, N visual tokens, T text tokens, D width, V vocabulary.
"""

from __future__ import annotations

import flax.struct

from meteor_jax.types import Array, DecodeCache, PruneStepTrace, PruneTrace, VisualTokens


@flax.struct.dataclass
class Encoded:
    """Images as the LLM takes them: `tokens` of [I, N, D], and what was pruned on the way."""

    tokens: VisualTokens
    trace: PruneTrace


@flax.struct.dataclass
class HiddenStates:
    """`x` float[B, T, D], what `Meteor.logits` makes logits of, at every text token."""

    x: Array
    trace: PruneTrace


@flax.struct.dataclass
class Forward:
    """`logits` float32[B, T, V]; those at place t predict the text token at t + 1."""

    logits: Array
    trace: PruneTrace


@flax.struct.dataclass
class Prefilled:
    """`logits` float32[B, V] of each row's last prompt token, the cache, and what the steps did."""

    logits: Array
    cache: DecodeCache
    prune_steps: tuple[PruneStepTrace, ...]


@flax.struct.dataclass
class Extended:
    """`logits` float32[B, T, V] of the new tokens, and the longer cache."""

    logits: Array
    cache: DecodeCache
