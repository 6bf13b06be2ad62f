"""What the model's methods return.

B examples, I images, N visual tokens, T text tokens, D width, V vocabulary.
"""

from __future__ import annotations

import flax.struct
from jaxtyping import Float, Float32

from meteor_jax.types import AnyArray, DecodeCache, PruneStepTrace, PruneTrace, VisualTokens


class Encoded(flax.struct.PyTreeNode):
    """Images as the LLM takes them: `tokens` of [I, N, D], and what was pruned on the way."""

    tokens: VisualTokens
    trace: PruneTrace


class HiddenStates(flax.struct.PyTreeNode):
    """What `Meteor.logits` makes logits of, at every text token."""

    x: Float[AnyArray, "B T D"]
    trace: PruneTrace


class Forward(flax.struct.PyTreeNode):
    """Logits at place t predict the text token at t + 1."""

    logits: Float32[AnyArray, "B T V"]
    trace: PruneTrace


class Prefilled(flax.struct.PyTreeNode):
    """Logits of each row's last prompt token, the cache, and what the steps did."""

    logits: Float32[AnyArray, "B V"]
    cache: DecodeCache
    prune_steps: tuple[PruneStepTrace, ...]


class Extended(flax.struct.PyTreeNode):
    """Logits of the new tokens, and the longer cache."""

    logits: Float32[AnyArray, "B T V"]
    cache: DecodeCache
