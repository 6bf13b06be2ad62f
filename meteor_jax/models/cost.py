"""What one image and its question cost, in floating-point operations: `python -m
meteor_jax.models.cost --config=configs/tiny.py --plans=full,meteor`.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from jax.extend import core
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from meteor_jax.config import build
from meteor_jax.models.convnext import KERNEL, STEM, ConvNextConfig
from meteor_jax.models.eva02 import Eva02Config
from meteor_jax.models.meteor import MeteorConfig
from meteor_jax.models.pix2struct import Pix2StructConfig
from meteor_jax.models.sam import GROUP, SamConfig
from meteor_jax.pruning.baselines import parse_plan, split_plans
from meteor_jax.pruning.encode import EncoderCut
from meteor_jax.pruning.fuse import Span, pooled_grids
from meteor_jax.pruning.plan import Calibration, PrunePlan
from meteor_jax.pruning.windows import window_order, window_quotas


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
    decode_tokens: tuple[float, ...] | None = None,
    num_images: float = 1,
) -> Cost:
    """Counts the encoders, projectors and the prefill of a prompt: images, `text_tokens` around.

    Embedding and head are left out, as in the paper's table. What the cuts themselves cost is the
    row "scores".

    Args:
        decode_tokens: visual tokens of the prompt after each cut of stage 3, as measured; the
            plan's `keep` an image where not given.
        num_images: of the prompt; a mean over prompts is counted as one of so many.
    """
    names = config.active_encoders(plan)
    shapes = {name: config.encoder(name) for name in names}
    cuts = plan.encode.encoder_cuts(shapes) if plan.encode else dict.fromkeys(names)
    rows, resizing, scores = [], 0.0, 0.0
    sizes = {}
    for name in names:
        encoder = shapes[name]
        resizing += resize_flops(config.image_size, encoder.image_size)
        if side := getattr(encoder, "position_side", 0):  # of the position embedding
            resizing += resize_flops(side, encoder.grid, channels=encoder.width)
        rows.append((name, encoder_flops(encoder, cuts[name])))
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
    rows.append(("projector", projector))

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
        config, plan, fused=fused, text_tokens=text_tokens, decode_tokens=decode_tokens,
        num_images=num_images,
    )
    rows = [(name, num_images * flops) for name, flops in rows]
    rows += [("llm", llm), ("resizing", num_images * resizing)]
    rows += [("scores", num_images * scores + llm_scores)]
    return Cost(tuple(rows), visual_tokens_fused=num_images * fused, visual_tokens_mean=mean)


def encoder_flops(encoder: Any, cuts: tuple[EncoderCut, ...] | None) -> float:
    """Patch embedding, blocks and neck of one encoder; cut tokens leave at the segment ends."""
    if isinstance(encoder, ConvNextConfig):
        return _convnext_flops(encoder)
    if isinstance(encoder, SamConfig):
        return _sam_flops(encoder, cuts)
    gated = isinstance(encoder, (Pix2StructConfig, Eva02Config))
    total = 2.0 * encoder.num_tokens * encoder.patch_size**2 * 3 * encoder.width
    for blocks, sizes in _segments(encoder, cuts):
        for block in blocks:
            tokens, keys = _tokens_and_keys(encoder, block, sizes)
            total += _block_flops(
                tokens, width=encoder.width, kv_width=encoder.width, mlp_dim=encoder.mlp_dim,
                num_matrices=3 if gated else 2, keys=keys,
            )
    return total


def encoder_score_flops(encoder: Any, cuts: tuple[EncoderCut, ...] | None) -> float:
    """Queries, keys and attention recomputed where a cut asks for attention received, and what
    merging at the output costs."""
    if cuts is None:
        return 0.0
    total = _merge_flops(encoder, cuts)
    if isinstance(encoder, ConvNextConfig):
        return total
    for cut, (blocks, sizes) in zip(cuts, _segments(encoder, cuts), strict=True):
        if cut.criterion not in ("attention", "cls") or cut.keep == sum(sizes):
            continue
        block = blocks[-1] if blocks else min(blocks.start, encoder.depth - 1)
        if isinstance(encoder, SamConfig):
            total += _sam_score_flops(encoder, block, sizes)
        else:
            tokens, keys = _tokens_and_keys(encoder, block, sizes)
            total += 2.0 * tokens * encoder.width * 2 * encoder.width
            total += 2.0 * tokens * keys * (encoder.width + encoder.num_heads)
    return total


def _merge_flops(encoder: Any, cuts: tuple[EncoderCut, ...]) -> float:
    """Likeness of the dropped tokens to those that gather them, and their sums."""
    dropped = cuts[-2].keep - cuts[-1].keep
    width = GROUP**2 * encoder.block_width if isinstance(encoder, SamConfig) else encoder.width
    return 2 * 2.0 * dropped * cuts[-1].merged * width


def _segments(
    encoder: Any, cuts: tuple[EncoderCut, ...] | None
) -> Iterator[tuple[range, tuple[int, ...]]]:
    """The blocks of each segment, and how many tokens are in each of its attention windows."""
    sizes, start = (encoder.num_tokens,), 0
    if isinstance(encoder, Eva02Config):
        _, sizes = window_order(encoder.grid, encoder.window)
    elif isinstance(encoder, SamConfig):
        _, sizes = window_order(encoder.grid, encoder.window // GROUP)
    for boundary, stop in enumerate(encoder.segment_ends):
        yield range(start, stop), sizes
        sizes, start = window_quotas(cuts[boundary].keep, sizes) if cuts else sizes, stop


def _tokens_and_keys(encoder: Any, block: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """A block's tokens, and how many of them each attends to; windows are equal here."""
    tokens = sum(sizes) + int(getattr(encoder, "keep_cls", False))
    if len(sizes) == 1 or block in encoder.global_blocks:
        return tokens, tokens
    return tokens, sizes[0]


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
        flops = 2.0 * total * against * width * plan.fuse.rounds
    elif plan.fuse.criterion == "max_min":
        flops = 2.0 * total**2 * width
    return flops, plan.fuse.keep


def llama_flops(
    config: MeteorConfig,
    plan: PrunePlan,
    *,
    fused: int,
    text_tokens: int,
    decode_tokens: tuple[float, ...] | None,
    num_images: float = 1,
) -> tuple[float, float, float]:
    """Operations of the layers, operations of stage 3's scores, mean visual tokens a layer.

    `fused` and the plan's budgets are of one image, `decode_tokens` of the whole prompt.
    """
    llama, decode = config.llama, plan.decode
    kv_width = llama.num_kv_heads * llama.head_dim
    layers = decode.layers if decode else ()
    kept = decode_tokens
    if kept is None:
        kept = tuple(num_images * keep for keep in decode.keep) if decode else ()
    visual = (num_images * fused, *kept)
    bounds = (0, *layers, llama.depth)
    flops = scores = mean = 0.0
    if decode and decode.queries == "raters":
        scores += 2.0 * (visual[0] + text_tokens) * text_tokens * llama.width
    for segment, (start, stop) in enumerate(itertools.pairwise(bounds)):
        tokens = visual[segment] + text_tokens
        flops += (stop - start) * _block_flops(
            tokens, width=llama.width, kv_width=kv_width, mlp_dim=llama.mlp_dim, num_matrices=3
        )
        mean += (stop - start) * visual[segment] / llama.depth
        if segment < len(layers) and decode.criterion == "text_attention":
            queries = 1 if decode.queries == "last" else text_tokens
            scores += 2.0 * tokens * llama.width * (llama.width + kv_width)
            scores += 2.0 * queries * tokens * (llama.width + llama.num_heads)
            scores += 2.0 * tokens * llama.num_heads
        elif segment < len(layers) and decode.criterion == "pivots":
            scores += 2.0 * tokens * llama.width * sum(min(n, tokens) for n in decode.pivots)
        if segment < len(layers):
            of_image = visual[segment] / max(num_images, 1)
            recycled, clusters = decode.recycling(segment, available=of_image)
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


def _block_flops(
    tokens: float, *, width: int, kv_width: int, mlp_dim: int, num_matrices: int,
    keys: float | None = None,
) -> float:
    """One transformer block: projections, attention of every token to `keys` (default: all), MLP.
    """
    keys = tokens if keys is None else keys
    projections = width * (2 * width + 2 * kv_width)
    return 2.0 * tokens * (projections + num_matrices * width * mlp_dim + 2 * keys * width)


def _sam_flops(encoder: SamConfig, cuts: tuple[EncoderCut, ...] | None) -> float:
    width, heads, inner = encoder.block_width, encoder.num_heads, GROUP**2
    total = 2.0 * inner * encoder.num_tokens * encoder.patch_size**2 * 3 * width
    for blocks, sizes in _segments(encoder, cuts):
        for block in blocks:
            windows, slots, side = _sam_windows(encoder, block, sizes)
            total += 2.0 * windows * slots * (3 * width**2 + 2 * side * width)
            total += 2.0 * windows * slots**2 * (2 * width + 2 * side * heads)
            total += 2.0 * inner * sum(sizes) * (width**2 + 2 * width * encoder.mlp_dim)
    kept = cuts[-1].keep if cuts else encoder.num_tokens
    return total + 2.0 * inner * kept * width * encoder.neck_width


def _sam_score_flops(encoder: SamConfig, block: int, sizes: tuple[int, ...]) -> float:
    width, heads = encoder.block_width, encoder.num_heads
    windows, slots, side = _sam_windows(encoder, block, sizes)
    total = 2.0 * windows * slots * (3 * width**2 + 2 * side * width)
    return total + 2.0 * windows * slots**2 * (width + 2 * side * heads + heads)


def _sam_windows(
    encoder: SamConfig, block: int, sizes: tuple[int, ...]
) -> tuple[int, int, int]:
    """Windows of a block, slots of a window, rows of a window; `sizes` count groups."""
    if block in encoder.global_blocks:
        return 1, GROUP**2 * sum(sizes), GROUP * encoder.grid
    whole = sum(sizes) == encoder.num_tokens
    slots = encoder.window**2 if whole else GROUP**2 * max(sizes)
    return len(sizes), slots, encoder.window


def _convnext_flops(encoder: ConvNextConfig) -> float:
    side = encoder.image_size // STEM
    total = 2.0 * side**2 * STEM**2 * 3 * encoder.widths[0]
    for stage, (depth, width) in enumerate(zip(encoder.depths, encoder.widths, strict=True)):
        if stage:
            side //= 2
            total += 2.0 * side**2 * 4 * encoder.widths[stage - 1] * width
        total += depth * 2.0 * side**2 * (KERNEL**2 * width + 8 * width**2)
    return total


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
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(
                shape[axis] for axis in contract
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
    """Prints one column a plan, one row a part."""
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
    table.add_row("mean over its layers", *(f"{c.visual_tokens_mean:.1f}" for c in costs.values()))
    Console().print(table)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file("config", None, "Experiment file, such as configs/tiny.py.")
    flags.DEFINE_string("plans", "full,meteor", "Plans, separated by commas.")
    flags.DEFINE_string("calibration", None, "A workdir's calibration.json, for measured ranks.")
    flags.DEFINE_integer("text_tokens", 0, "Text tokens around the image.")
    flags.mark_flag_as_required("config")
    app.run(main)
