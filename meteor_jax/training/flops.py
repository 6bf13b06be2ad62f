"""What a training step costs: the numerator of TFLOP/s and of MFU.

Counted: the matrix products and convolutions that the step needs, over every row and every padded
place: forward once; backward once more for the gradients of weights that train, and once more for
those of inputs where something before or in the same part trains. What rematerialisation computes
again is not counted (as in MFU's definition: Chowdhery et al. 2022, PaLM, appendix B), nor is the
optimizer.

T text places, I images a row, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from meteor_jax.models.eagle.cost import count_cost, llama_flops
from meteor_jax.models.eagle.model import MeteorConfig
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.training.optimizer import split_trainable
from meteor_jax.types import Batch


def train_step_flops(
    config: MeteorConfig,
    plan: PrunePlan,
    *,
    batch: Batch,
    params: dict[str, Any],
    trainable: tuple[str, ...],
) -> float:
    """Operations of one step over a whole batch, on all devices together.

    Args:
        plan: as trained, `plan.for_training()`.
        batch, params: arrays or their shapes; the batch of all processes.
        trainable: the stage's patterns.
    """
    rows, images = batch.images.shape[:2]
    text = batch.tokens.shape[1] - images  # an image's mark is no token
    cost = count_cost(config, plan, text_tokens=text)
    llm, _, _ = llama_flops(
        config, plan, fused=images * cost.visual_tokens_fused, text_tokens=text, computed=None
    )
    llm += 2.0 * batch.tokens.shape[1] * config.llama.width * config.llama.vocab_size  # the head
    shares = _trainable_shares(params, trainable)

    parts = dict(cost.rows)
    towers = [name for name in parts if name in config.encoders]
    total = images * (parts["resizing"] + parts["scores"])
    for name in towers:
        total += images * parts[name] * _passes(shares.get(name, 0.0), before=False)
    below = any(shares.get(name) for name in towers)
    projectors = [share for name, share in shares.items() if name.startswith("projector")]
    projector = max(projectors, default=0.0)
    total += images * parts["projector"] * _passes(projector, before=below)
    share, before = shares.get("llama", 0.0), below or projector > 0
    total += llm * _passes(share, before=before)
    if before:  # attention's products have two inputs each, and no weights that could be frozen
        places = images * cost.visual_tokens_fused + text
        total += (1.0 - share) * 4.0 * config.llama.depth * places**2 * config.llama.width
    return rows * total


def _passes(share: float, *, before: bool) -> float:
    """How often a part's forward count is spent: itself, its weights' and its inputs' gradients."""
    return 1.0 + share + (1.0 if share or before else 0.0)


def _trainable_shares(params: dict[str, Any], trainable: tuple[str, ...]) -> dict[str, float]:
    """By part ("llama", "clip", …), the share of its parameters that train."""
    learns, frozen = split_trainable(params, trainable)
    sizes: dict[str, list[int]] = {}
    for index, leaves in enumerate((learns, frozen)):
        for path, leaf in leaves.items():
            sizes.setdefault(path.split("/")[0], [0, 0])[index] += leaf.size
    return {part: a / (a + b) for part, (a, b) in sizes.items()}
