"""Measures what adaptive budgets need: λ of every step, and the static totals of its batches.

I images, T text tokens, K kept tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32

from meteor_jax.models.family import ModelConfig, count_cost
from meteor_jax.parallel.distributed import allgather_to_host
from meteor_jax.pruning.budgets import Adaptive, Budget, Fixed, steps_that_drop
from meteor_jax.pruning.ops.budgets import expected_total, fit_edges, fit_lambda
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import AnyArray, Array, PruneStepTrace, VisualTokens

EVEN = 0.2  # spread of K, from the 5th to the 95th percentile over the mean, that is hardly any


class Questions(flax.struct.PyTreeNode):
    """One question about each of I images; `asked` is False where an image has no such one."""

    tokens: Int32[AnyArray, "I T"]
    text_valid: Bool[AnyArray, "I T"]
    asked: Bool[AnyArray, " I"]


@dataclasses.dataclass(frozen=True)
class MeasuredBudgets:
    """What was measured for the decoder's steps of a plan.

    Attributes:
        budgets: of each step, the adaptive ones with λ and edges.
        kept: by step and image, K of its questions.
    """

    budgets: tuple[Budget, ...]
    kept: tuple[tuple[np.ndarray, ...], ...]


def calibrate_budget(
    model: Any,
    params: Any,
    images: Array,
    *,
    questions: tuple[Questions, ...],
    plan: PrunePlan,
    num_shards: int = 1,
) -> MeasuredBudgets:
    """λ of every adaptive step of a plan, such that the mean of K over the first question of each
    image is its `keep`, and the totals that hold the K of batches of all questions.

    Step after step, because what a step sees, and how many tokens reach it, depends on those
    before. A step that can drop nothing needs no λ, and has 1.

    Args:
        num_shards: over how many shards batches will be split.

    Shapes:
        images: uint8[I, H, W, 3].

    Raises:
        ConfigError: if no attention falls on the images.
    """
    visual = encode_each(params, images, model=model, plan=plan)
    asked_for = [step.budget for step in plan.decoder_steps]
    # One total: how much room a batch is packed into changes no K, and there is less to compile.
    budgets = [_adaptive(budget, lambda_=1.0, num_totals=1) for budget in asked_for]

    def run(of_image: Questions) -> tuple[PruneStepTrace, ...]:
        current = plan.with_decoder_budgets(budgets)
        return allgather_to_host(_prune_steps(params, visual, of_image, model=model, plan=current))

    for index in steps_that_drop(budgets, available=visual.num_tokens):
        if not isinstance(budgets[index], Adaptive):
            continue
        traces = run(questions[0])
        available = np.full(len(traces[0].num_kept), visual.num_tokens)
        lambda_ = fit_lambda(
            np.asarray(traces[index].budget_signal),
            low_high=budgets[index].bounds,
            target=budgets[index].keep,
            available=traces[index - 1].num_kept if index else available,
        )
        budgets[index] = _adaptive(budgets[index], lambda_=lambda_)
    runs = [run(of_image) for of_image in questions]
    asked = np.stack([np.asarray(of_image.asked) for of_image in questions], axis=1)
    kept, available = [], visual.num_tokens
    for index, budget in enumerate(asked_for):
        counts = np.stack([traces[index].num_kept for traces in runs], axis=1)
        kept.append(tuple(row[here] for row, here in zip(counts, asked, strict=True)))
        available = min(budget.bounds[1], available)
        if isinstance(budget, Adaptive):
            edges = fit_edges(
                kept[-1], high=available, num_totals=budget.num_totals, num_shards=num_shards
            )
            budgets[index] = _adaptive(budgets[index], edges=edges, num_totals=budget.num_totals)
    return MeasuredBudgets(tuple(budgets), tuple(kept))


def _adaptive(budget: Budget, **fields: Any) -> Budget:
    return dataclasses.replace(budget, **fields) if isinstance(budget, Adaptive) else budget


def evenness_note(
    config: ModelConfig,
    plan: PrunePlan,
    measured: MeasuredBudgets,
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
    counts = [np.concatenate(of_step) for of_step in measured.kept]
    spans = [np.percentile(count, (5, 95)) for count in counts]
    if any(np.diff(s)[0] > EVEN * c.mean() for s, c in zip(spans, counts, strict=True)):
        return ""
    available = int(count_cost(config, plan.without("decode")).visual_tokens_fused)
    computed = []
    for budget, of_step in zip(measured.budgets, measured.kept, strict=True):
        totals = budget.totals(rows=rows, available=available)
        computed.append(expected_total(of_step, rows=rows, totals=totals, num_shards=num_shards))
        available = min(budget.bounds[1], available)
    adaptive = count_cost(
        config,
        plan.with_decoder_budgets(measured.budgets),
        text_tokens=text_tokens,
        computed=tuple(computed),
        rows=rows,
    ).total_flops
    fixed = plan.with_decoder_budgets([Fixed(budget.keep) for budget in measured.budgets])
    fixed = count_cost(config, fixed, text_tokens=text_tokens).total_flops
    if fixed >= adaptive:
        return ""
    spread = ", ".join(f"{low:.0f}–{high:.0f}" for low, high in spans)
    return (
        f"{plan.name}: 90 % of the questions keep {spread} tokens after the decoder's prune steps, "
        f"which is nearly a fixed budget; decode.budget=fixed computes {fixed / 1e9:,.4g} GFLOPs a "
        f"question, this {adaptive / 1e9:,.4g}."
    )


@jax.jit(static_argnames=("model", "plan"))
def encode_each(params: Any, images: Array, *, model: Any, plan: PrunePlan) -> VisualTokens:
    """VisualTokens of [I, 1, N, D]: one image a prompt."""
    encoded = model.apply({"params": params}, images, plan=plan, method="encode_images")
    return jax.tree.map(lambda x: x[:, None], encoded.tokens)


@jax.jit(static_argnames=("model", "plan"))
def _prune_steps(
    params: Any, visual: VisualTokens, questions: Questions, *, model: Any, plan: PrunePlan
) -> tuple[PruneStepTrace, ...]:
    return model.apply(
        {"params": params},
        visual,
        image_valid=jnp.ones((len(questions.tokens), 1), bool),
        tokens=questions.tokens,
        text_valid=questions.text_valid,
        plan=plan,
        max_new_tokens=0,
        method="prefill",
    ).prune_steps
