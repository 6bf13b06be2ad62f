"""What one prompt costs, in floating-point operations by part of the model.

The parts are counted in the traces of the two programs that inference runs (`models.flops`): the
encoding of an image, and the prefill of a prompt. The sum for EAGLE-X4-7B is the 26.2 TFLOPs of
METEOR's table (arXiv 2507.20842).

I images, N visual tokens, T text places.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.models.eagle.model import Meteor, MeteorConfig
from meteor_jax.models.family import build_model
from meteor_jax.models.flops import Cost, Flops, counted_forms, trace_flops
from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import VisualTokens


def count_cost(
    config: MeteorConfig,
    plan: PrunePlan,
    *,
    text_tokens: int = 1,
    computed: tuple[float, ...] | None = None,
    num_images: int = 1,
    rows: int = 1,
) -> Cost:
    """Counts the encoders, projectors and the prefill of a prompt: images, `text_tokens` around.

    The rows are each encoder, "projector", "llm", "resizing" (of pixels, position embeddings and
    grids) and "scores" (what the plan computes to choose or merge tokens).
    Embedding and head are left out, as in the paper's table. Attention counts over all pairs,
    padded entries as any other, because the program computes them.

    What an adaptive budget costs depends on which static total a batch was packed into. The
    program holds a branch for each. Where `computed` is given, each pruning step counts as the
    mixture of its two branches nearest to it, which have that mean. That is exact for a batch of
    several rows, whose branches differ by a multiple of their totals. Without `computed`, the plan
    counts as if its budgets were fixed at `keep`.

    Args:
        text_tokens: places of the prompt's text, the marks of images and padding included.
        computed: visual tokens of the prompt that the layers after each pruning step of the
            decoder computed, as measured (`PruneStepTrace.num_computed`), or a mean of such.
        num_images: of the prompt.
        rows: prompts of a batch (on one shard of its rows), which share an adaptive budget's total.
    """
    if not plan.is_adaptive or computed is None:
        rows, computed = 1, tuple(num_images * s.budget.keep for s in plan.decoder_steps)
        plan = plan.with_decoder_budgets([Fixed(s.budget.keep) for s in plan.decoder_steps])
    text_tokens = max(text_tokens, 1)
    parts, tokens = _count_encoding(config, dataclasses.replace(plan.without("decode"), name=""))
    llm = _count_prefill(
        config,
        PrunePlan(name="", steps=plan.decoder_steps, enter_at=plan.enter_at),
        num_tokens=tokens.num_tokens,
        span=tokens.span,
        text_tokens=text_tokens,
        num_images=num_images,
        rows=rows,
    )
    weights = _branch_weights(llm, computed, text_tokens=text_tokens, rows=rows)
    starts = (0, plan.enter_at, *plan.decoder_layers, config.llama.depth)
    lengths = [stop - start for start, stop in itertools.pairwise(starts)]
    visual = np.repeat((0, num_images * tokens.num_tokens, *computed), lengths).mean()
    totals = {part: num_images * count for part, count in parts.items()}
    for part, count in llm.grouped(_part_of_prefill, weights=weights).items():
        totals[part] = totals.get(part, 0.0) + count / rows
    names = (*config.active_encoders(plan), "projector", "llm", "resizing", "scores")
    return Cost(
        rows=tuple((name, totals.get(name, 0.0)) for name in names),
        visual_tokens_fused=num_images * tokens.num_tokens,
        visual_tokens_mean=float(visual),
    )


def _branch_weights(
    flops: Flops, computed: tuple[float, ...], *, text_tokens: int, rows: int
) -> dict[int, list[float]]:
    """By number of a conditional, how often each of its totals was taken, so that the visual tokens
    of a row have the mean `computed`."""
    weights = {}
    for i, branches in enumerate(flops.conditionals):
        searched = [_TOTAL.search(next(branch.scopes, "")) for branch in branches]
        found = [match for match in searched if match]
        if len(found) < len(searched):
            continue  # a conditional that is no choice among totals
        tokens = [int(match["entries"]) / rows - text_tokens for match in found]
        unit = np.eye(len(tokens))
        step = int(found[0]["step"])
        weights[i] = [np.interp(computed[step], tokens, taken).item() for taken in unit]
    return weights


_TOTAL = re.compile(r"prune_(?P<step>\d+)/.*entries_(?P<entries>\d+)")


@functools.lru_cache(maxsize=256)
def _count_encoding(config: MeteorConfig, plan: PrunePlan) -> tuple[dict[str, float], VisualTokens]:
    """Operations by part for one image, and the shapes of the tokens that it becomes."""
    model, names = Meteor(config), config.active_encoders(plan)
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.uint8)

    def encode(params: Any, images: Any) -> VisualTokens:
        variables = {"params": params}
        return model.apply(variables, images, plan=plan, method="encode_images").tokens

    def part(scope: str) -> str:
        modules = scope.split("/")
        if "scores" in modules:
            return "scores"
        if "resize" in modules:
            return "resizing"
        own = [name for name in modules if name in names or name.startswith("projector")]
        return "scores" if not own else own[0] if own[0] in names else "projector"

    with counted_forms():
        flops, tokens = trace_flops(encode, _param_shapes(config), images)
    return flops.grouped(part), tokens


@functools.lru_cache(maxsize=256)
def _count_prefill(
    config: MeteorConfig,
    plan: PrunePlan,
    *,
    num_tokens: int,
    span: int,
    text_tokens: int,
    num_images: int,
    rows: int,
) -> Flops:
    """Operations of the prefill of `rows` prompts."""
    llama = config.llama
    positions = max(text_tokens + num_images * span, llama.max_positions)  # any prompt is counted
    model = Meteor(
        dataclasses.replace(config, llama=dataclasses.replace(llama, max_positions=positions))
    )

    def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *sizes), dtype)

    places = shape(num_images, num_tokens)
    visual = VisualTokens(
        x=shape(num_images, num_tokens, llama.width, dtype=jnp.dtype(config.dtype)),
        encoder=places,
        patch_index=places,
        position=places,
        span=span,
    )
    prompts = {
        "image_valid": shape(num_images, dtype=jnp.bool_),
        "tokens": shape(text_tokens),
        "text_valid": shape(text_tokens, dtype=jnp.bool_),
    }

    def prefill(params: Any, visual: VisualTokens, prompts: dict[str, Any]) -> Any:
        options = {"plan": plan, "max_new_tokens": 0, "method": "prefill"}
        return model.apply({"params": params}, visual, **prompts, **options)

    with counted_forms():
        flops, _ = trace_flops(prefill, _param_shapes(config), visual, prompts)
    return flops


def _part_of_prefill(scope: str) -> str:
    modules = scope.split("/")
    if any(module.endswith(".logits") for module in modules):
        return "head"
    return "scores" if "scores" in modules else "llm"


@functools.lru_cache(maxsize=16)
def _param_shapes(config: MeteorConfig) -> Any:
    model = build_model(config)
    return jax.eval_shape(functools.partial(model.init_params, seed=0), model.inputs_spec(1))
