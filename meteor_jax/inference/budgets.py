"""Measures what an adaptive stage 3 needs: λ of every cut, and the static totals of its batches.

I images, T text tokens, K kept tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.models.eagle.model import Meteor, MeteorConfig
from meteor_jax.models.family import count_cost
from meteor_jax.parallel.distributed import allgather_to_host
from meteor_jax.pruning.ops.budgets import expected_total, fit_edges, fit_scale
from meteor_jax.pruning.plan import DecodePlan, PrunePlan
from meteor_jax.types import Array, CutTrace, VisualTokens

EVEN = 0.2  # spread of K, from the 5th to the 95th percentile over the mean, that is hardly any


@flax.struct.dataclass
class Questions:
    """One question about each of I images.

    Shapes:
        tokens: int32[I, T], text_valid: bool[I, T].
        asked: bool[I]; False where an image has no such question.
    """

    tokens: Array
    text_valid: Array
    asked: Array


@dataclasses.dataclass(frozen=True)
class Budget:
    """What was measured for the stage 3 of a plan.

    Attributes:
        decode: with λ and edges.
        kept: by cut and image, K of its questions.
    """

    decode: DecodePlan
    kept: tuple[tuple[np.ndarray, ...], ...]


def calibrate_budget(
    model: Meteor,
    params: Any,
    images: Array,
    *,
    questions: tuple[Questions, ...],
    plan: PrunePlan,
    num_shards: int = 1,
) -> Budget:
    """λ of every cut of an adaptive plan, such that the mean of K over the first question of each
    image is its `keep`, and the totals that hold the K of batches of all questions.

    Cut after cut, because what a cut sees, and how many tokens reach it, depends on those before. A
    cut that can drop nothing needs no λ, and has 1.

    Args:
        num_shards: over how many shards batches will be split.

    Shapes:
        images: uint8[I, H, W, 3].

    Raises:
        ConfigError: if no attention falls on the images.
    """
    visual = _encode(params, images, model=model, plan=plan)
    # One total: how much room a batch is packed into changes no K, and there is less to compile.
    decode = dataclasses.replace(plan.decode, scale=(1.0,) * len(plan.decode.layers), num_totals=1)

    def run(of_image: Questions) -> tuple[CutTrace, ...]:
        current = dataclasses.replace(plan, decode=decode)
        return allgather_to_host(_cuts(params, visual, of_image, model=model, plan=current))

    for cut in decode.cuts_that_drop(available=visual.num_tokens):
        cuts = run(questions[0])
        available = np.full(len(cuts[0].num_kept), visual.num_tokens)
        scale = fit_scale(
            chosen_mass(cuts[cut], plan=decode),
            low_high=decode.bounds(cut),
            target=decode.keep[cut],
            available=cuts[cut - 1].num_kept if cut else available,
        )
        decode = dataclasses.replace(
            decode, scale=(*decode.scale[:cut], scale, *decode.scale[cut + 1 :])
        )
    runs = [run(of_image) for of_image in questions]
    asked = np.stack([np.asarray(of_image.asked) for of_image in questions], axis=1)
    kept, edges, available = [], [], visual.num_tokens
    for cut in range(len(decode.layers)):
        counts = np.stack([cuts[cut].num_kept for cuts in runs], axis=1)
        kept.append(tuple(row[here] for row, here in zip(counts, asked, strict=True)))
        available = min(decode.bounds(cut)[1], available)
        edges.append(
            fit_edges(
                kept[-1],
                high=available,
                num_totals=plan.decode.num_totals,
                num_shards=num_shards,
            )
        )
    decode = dataclasses.replace(decode, edges=tuple(edges), num_totals=plan.decode.num_totals)
    return Budget(decode, tuple(kept))


def evenness_note(
    config: MeteorConfig,
    plan: PrunePlan,
    budget: Budget,
    *,
    rows: int,
    text_tokens: int,
    num_shards: int = 1,
) -> str:
    """A line where K hardly differs between questions, so that a fixed budget costs less; else "".

    Args:
        rows: prompts of a shard of a batch, which has `num_shards`.
        text_tokens: places of a prompt's text.
    """
    decode, counts = budget.decode, [np.concatenate(of_cut) for of_cut in budget.kept]
    spans = [np.percentile(count, (5, 95)) for count in counts]
    if any(np.diff(s)[0] > EVEN * c.mean() for s, c in zip(spans, counts, strict=True)):
        return ""
    plan = dataclasses.replace(plan, decode=decode)
    available = int(count_cost(config, dataclasses.replace(plan, decode=None)).visual_tokens_fused)
    computed = []
    for cut, of_cut in enumerate(budget.kept):
        totals = decode.totals(cut, rows=rows, available=available)
        computed.append(expected_total(of_cut, rows=rows, totals=totals, num_shards=num_shards))
        available = min(decode.bounds(cut)[1], available)
    adaptive = count_cost(
        config, plan, text_tokens=text_tokens, computed=tuple(computed), rows=rows
    ).total_flops
    fixed = dataclasses.replace(plan, decode=dataclasses.replace(decode, budget="fixed"))
    fixed = count_cost(config, fixed, text_tokens=text_tokens).total_flops
    if fixed >= adaptive:
        return ""
    spread = ", ".join(f"{low:.0f}–{high:.0f}" for low, high in spans)
    return (
        f"{plan.name}: 90 % of the questions keep {spread} tokens at the cuts, which is nearly a "
        f"fixed budget; decode.budget=fixed computes {fixed / 1e9:,.4g} GFLOPs a question, this "
        f"{adaptive / 1e9:,.4g}."
    )


def chosen_mass(trace: CutTrace, *, plan: DecodePlan) -> np.ndarray:
    """float[B]: Σ of the visual attention values of the heads that count."""
    values = np.sort(trace.visual_attention_value, axis=1)
    heads = min(plan.heads, values.shape[1]) if plan.heads else values.shape[1]
    return values[:, values.shape[1] - heads :].sum(1)


@jax.jit(static_argnames=("model", "plan"))
def _encode(params: Any, images: Array, *, model: Meteor, plan: PrunePlan) -> VisualTokens:
    encoded = model.apply({"params": params}, images, plan=plan, method="encode_images")
    return jax.tree.map(lambda x: x[:, None], encoded.tokens)


@jax.jit(static_argnames=("model", "plan"))
def _cuts(
    params: Any, visual: VisualTokens, questions: Questions, *, model: Meteor, plan: PrunePlan
) -> tuple[CutTrace, ...]:
    return model.apply(
        {"params": params},
        visual,
        image_valid=jnp.ones((len(questions.tokens), 1), bool),
        tokens=questions.tokens,
        text_valid=questions.text_valid,
        plan=plan,
        max_new_tokens=0,
        method="prefill",
    ).cuts
