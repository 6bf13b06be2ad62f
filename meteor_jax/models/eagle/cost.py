"""What one image and its question cost, in floating-point operations.

    meteor flops --config=configs/tiny.py --plans=full,meteor

Counted: matrix products and convolutions, 2 operations a multiply-add, attention over all pairs
(not halved for causality). The sum for EAGLE-X4-7B is the 26.2 TFLOPs of METEOR's table. Two
counters stand here: closed formulas with one row a part, and a walk over a traced program.

N tokens, T text tokens, D width.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from jax.extend import core
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from meteor_jax.config import build
from meteor_jax.models.eagle.encoder_cost import block_flops, encoder_flops, encoder_score_flops
from meteor_jax.models.eagle.model import MeteorConfig
from meteor_jax.pruning.baselines import parse_plan, split_plans
from meteor_jax.pruning.fuse import Span, pooled_grids
from meteor_jax.pruning.plan import Calibration, PrunePlan


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations by part for one prompt, and how many visual tokens the LLM saw.

    Attributes:
        rows: (part, operations).
        visual_tokens_fused: tokens of its images that enter the LLM.
        visual_tokens_mean: tokens of its images in the LLM, mean over its layers.
    """

    rows: tuple[tuple[str, float], ...]
    visual_tokens_fused: float
    visual_tokens_mean: float

    @property
    def total_flops(self) -> float:
        return sum(flops for _, flops in self.rows)


def count_cost(
    config: MeteorConfig,
    plan: PrunePlan,
    *,
    text_tokens: int = 0,
    computed: tuple[float, ...] | None = None,
    num_images: float = 1,
    rows: int = 1,
) -> Cost:
    """Counts the encoders, projectors and the prefill of a prompt: images, `text_tokens` around.

    Embedding and head are left out, as in the paper's table. What the cuts themselves cost is the
    row "scores".

    Args:
        text_tokens: places of the prompt's text, padding included: what the program computes.
        computed: visual tokens of the prompt that the layers after each cut of stage 3 computed,
            as measured (`CutTrace.num_computed`); the plan's `keep` an image where not given.
        num_images: of the prompt; a mean over prompts is counted as one of so many.
        rows: prompts of a batch (on one shard of its rows), which share an adaptive budget's total.
    """
    names = config.active_encoders(plan)
    shapes = {name: config.encoder(name) for name in names}
    cuts = plan.encode.encoder_cuts(shapes) if plan.encode else dict.fromkeys(names)
    parts, resizing, scores = [], 0.0, 0.0
    sizes = {}
    for name in names:
        encoder = shapes[name]
        resizing += resize_flops(config.image_size, encoder.image_size)
        if side := getattr(encoder, "position_side", 0):  # of the position embedding
            resizing += resize_flops(side, encoder.grid, channels=encoder.width)
        parts.append((name, encoder_flops(encoder, cuts[name])))
        scores += encoder_score_flops(encoder, cuts[name])
        sizes[name] = cuts[name][-1].keep if cuts[name] else encoder.num_tokens

    width = config.llama.width
    if config.fusion == "post":
        projector = sum(projector_flops(n, shapes[name].width, width) for name, n in sizes.items())
        grids = {name: shapes[name].grid for name in names}
    else:
        for name in names:
            resizing += resize_flops(shapes[name].grid, config.grid, channels=shapes[name].width)
        sizes, grids = {"all": config.grid**2}, {"all": config.grid}
        projector = projector_flops(sizes["all"], sum(s.width for s in shapes.values()), width)
    parts.append(("projector", projector))

    fused = sum(sizes.values())
    if plan.fuse is not None:
        if config.fusion == "pre" and plan.fuse.criterion == "cooperative":
            # Each encoder's part of the projector's first layer, one "token" a place.
            scores += 2.0 * sizes["all"] * width * sum(s.width for s in shapes.values())
            compared = dict.fromkeys(names, sizes["all"])
        else:
            compared = sizes
        fuse_scores, fused = fuse_flops(plan, sizes=compared, grids=grids, width=width)
        scores += fuse_scores
    llm, llm_scores, mean = llama_flops(
        config,
        plan,
        fused=fused,
        text_tokens=text_tokens,
        computed=computed,
        num_images=num_images,
        rows=rows,
    )
    parts = [(name, num_images * flops) for name, flops in parts]
    parts += [("llm", llm), ("resizing", num_images * resizing)]
    parts += [("scores", num_images * scores + llm_scores)]
    return Cost(tuple(parts), visual_tokens_fused=num_images * fused, visual_tokens_mean=mean)


def fuse_flops(
    plan: PrunePlan, *, sizes: dict[str, int], grids: dict[str, int], width: int
) -> tuple[float, int]:
    """What stage 2 costs, and the tokens that it leaves."""
    total = sum(sizes.values())
    if plan.fuse.criterion == "pool":
        spans = tuple(Span(name, 0, size, grids[name]) for name, size in sizes.items())
        sides = pooled_grids(plan.fuse.keep, spans=spans)
        flops = sum(
            2.0 * width * side * grid * (grid + side)
            for side, grid in zip(sides, grids.values(), strict=True)
        )
        return flops, sum(side**2 for side in sides)
    flops = 0.0
    if plan.fuse.criterion == "cooperative":
        against = total if plan.fuse.similarity in ("abs_cosine", "max_cosine") else 1
        flops = 2.0 * total * against * width * plan.fuse.num_iterations
    elif plan.fuse.criterion == "max_min":
        flops = 2.0 * total**2 * width
    return flops, plan.fuse.keep


def llama_flops(
    config: MeteorConfig,
    plan: PrunePlan,
    *,
    fused: int,
    text_tokens: int,
    computed: tuple[float, ...] | None,
    num_images: float = 1,
    rows: int = 1,
) -> tuple[float, float, float]:
    """Operations of the layers, operations of stage 3's scores, mean visual tokens a layer.

    `fused` and the plan's budgets are of one image, `computed` of the whole prompt.
    """
    llama, decode = config.llama, plan.decode
    kv_width = llama.num_kv_heads * llama.head_dim
    drops = decode.cuts_that_drop(available=fused) if decode else ()
    visual, longest, available = [num_images * fused], [num_images * fused], fused
    for cut in drops:
        measured = num_images * decode.keep[cut] if computed is None else computed[cut]
        available = min(decode.bounds(cut)[1], available)
        visual.append(measured)
        # Rows of unequal length share a buffer, but attend as rows of the longest.
        shared = rows > 1 and computed is not None and decode.budget == "adaptive"
        longest.append(num_images * available if shared else measured)
    bounds = (0, *(decode.layers[cut] for cut in drops), llama.depth)
    flops = scores = mean = 0.0
    if drops and decode.queries == "raters":
        scores += 2.0 * (visual[0] + text_tokens) * text_tokens * llama.width
    for segment, (start, stop) in enumerate(itertools.pairwise(bounds)):
        tokens, entries = visual[segment] + text_tokens, longest[segment] + text_tokens
        flops += (stop - start) * block_flops(
            tokens,
            width=llama.width,
            kv_width=kv_width,
            mlp_dim=llama.mlp_dim,
            num_matrices=3,
            pairs=entries**2,
        )
        mean += (stop - start) * visual[segment] / llama.depth
        if segment == len(drops):
            break
        if decode.criterion == "text_attention":
            queries = 1 if decode.queries == "last" else text_tokens
            scores += 2.0 * queries * llama.width**2
            if decode.score_layer == "next" or decode.rotary == "without":
                scores += 2.0 * entries * llama.width * kv_width
            scores += 2.0 * queries * entries * (llama.width + llama.num_heads)
            scores += 2.0 * entries * llama.num_heads
        elif decode.criterion == "pivots":
            scores += 2.0 * entries * llama.width * sum(min(n, entries) for n in decode.pivots)
        of_image = visual[segment] / max(num_images, 1)
        recycled, clusters = decode.recycling(drops[segment], available=of_image)
        scores += 2.0 * num_images * recycled * (recycled + clusters) * llama.width
    return flops, scores, mean


def projector_flops(tokens: int, in_width: int, out_width: int) -> float:
    """Two layers: 2 · N · (E · D + D · D)."""
    return 2.0 * tokens * out_width * (in_width + out_width)


def resize_flops(size_in: int, size_out: int, *, channels: int = 3) -> float:
    """Two matrix products, rows then columns; 0 where nothing changes."""
    if size_in == size_out:
        return 0.0
    return 2.0 * channels * size_out * size_in * (size_in + size_out)


def count_traced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """Operations of the program that `function` traces to, from shapes alone.

    Loops count each turn; of a conditional's branches the largest counts. Custom kernels are not
    seen.
    """
    return _count_jaxpr(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _count_jaxpr(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += (
                2.0
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(shape[axis] for axis in contract)
            )
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_features = params["dimension_numbers"].rhs_spec[0]
            taps = math.prod(kernel) / kernel[out_features]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * taps
        elif name == "cond":
            total += max(_count_jaxpr(branch.jaxpr) for branch in params["branches"])
        else:
            turns = params["length"] if name == "scan" else 1
            if name == "shard_map":  # whose inner shapes are one shard's
                turns = math.prod(params["mesh"].shape[axis] for axis in params["manual_axes"])
            total += turns * sum(_count_jaxpr(inner) for inner in _inner_jaxprs(params))
    return total


def _inner_jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The programs inside an equation: of calls, loops, rematerialisation, custom rules."""
    found = []
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            found.append(value)
    return found


def main(argv: list[str]) -> None:
    """Prints one column a plan, one row a part; an adaptive budget counts as its mean."""
    del argv
    try:
        config = FLAGS.config
        model = build(MeteorConfig, config.model.to_dict(), where="config.model")
        calibration = Calibration.load(Path(FLAGS.calibration or os.devnull))
        costs = {}
        for text in split_plans(FLAGS.plans):
            plan = parse_plan(text, library=config.plans.to_dict()).calibrated(calibration)
            costs[text] = count_cost(model, plan, text_tokens=FLAGS.text_tokens)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    table = Table("GFLOPs of one image", *costs)
    for i, (part, _) in enumerate(next(iter(costs.values())).rows):
        table.add_row(part, *(f"{cost.rows[i][1] / 1e9:,.3f}" for cost in costs.values()))
    table.add_section()
    table.add_row("total", *(f"{cost.total_flops / 1e9:,.3f}" for cost in costs.values()))
    table.add_row("tokens into the LLM", *(str(c.visual_tokens_fused) for c in costs.values()))
    means = (f"{cost.visual_tokens_mean:.1f}" for cost in costs.values())
    table.add_row("kept, mean over its layers", *means)
    Console().print(table)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file("config", None, "Experiment file, such as configs/tiny.py.")
    flags.DEFINE_string("plans", "full,meteor", "Plans, separated by commas.")
    flags.DEFINE_string("calibration", None, "A workdir's calibration.json, for measured ranks.")
    flags.DEFINE_integer("text_tokens", 0, "Text tokens around the image.")
    flags.mark_flag_as_required("config")
    app.run(main)
