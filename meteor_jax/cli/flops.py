"""Operations of one image and its question, up to the first token, under plans.

    meteor flops --config=configs/tiny.py --plans=full,meteor \\
        --calibration=runs/tiny/calibration.json

One column a plan, one row a part. An adaptive budget counts as its mean.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from meteor_jax.cli.flags import (
    define_calibration,
    define_config,
    define_plans,
    read_calibration,
    read_config,
    read_plans,
)
from meteor_jax.config import ConfigError
from meteor_jax.experiment.plans import resolve_plans
from meteor_jax.inference.engine.predictor import check_fits
from meteor_jax.inference.layout import param_shapes
from meteor_jax.models.family import build_model
from meteor_jax.models.flops import Cost
from meteor_jax.parallel.mesh import MeshConfig, make_mesh

TEXT_TOKENS = 64  # of a question and its template


def define_flags() -> None:
    define_config()
    define_plans("full,meteor")
    define_calibration()
    flags.DEFINE_integer(
        "text_tokens",
        None,
        f"Text tokens around the image. Default: {TEXT_TOKENS}, or config.data.text_length where "
        "that is less.",
        lower_bound=1,
    )


def main(options: flags.FlagValues) -> None:
    """Counts each plan once it is known to fit the model."""
    experiment = read_config(options)
    plans = resolve_plans(
        read_plans(options), library=experiment.plans, calibration=read_calibration(options)
    )
    text_tokens = options.text_tokens or min(TEXT_TOKENS, experiment.data.text_length)
    model, mesh = build_model(experiment.model), make_mesh(MeshConfig(), devices=jax.devices()[:1])
    shapes, costs = param_shapes(experiment, mesh=mesh), {}
    for plan in plans:
        try:
            check_fits(model, shapes, plan=plan)
            costs[plan.name] = model.count_cost(plan, text_tokens=text_tokens)
        except ValueError as error:
            raise ConfigError(f"plan '{plan.name}': {error}") from error
    Console().print(cost_table(costs, text_tokens=text_tokens))


def cost_table(costs: Mapping[str, Cost], *, text_tokens: int) -> Table:
    """One column a plan, one row a part."""
    table = Table(f"GFLOPs of one image and {text_tokens} text tokens", *costs)
    parts = [dict(cost.rows) for cost in costs.values()]
    for part in dict.fromkeys(name for of_plan in parts for name in of_plan):
        found = (of_plan.get(part) for of_plan in parts)
        table.add_row(part, *("" if flops is None else f"{flops / 1e9:,.3f}" for flops in found))
    table.add_section()
    table.add_row("total", *(f"{cost.total_flops / 1e9:,.3f}" for cost in costs.values()))
    table.add_row("tokens into the LLM", *(str(c.visual_tokens_fused) for c in costs.values()))
    means = (f"{cost.visual_tokens_mean:.1f}" for cost in costs.values())
    table.add_row("kept, mean over its layers", *means)
    return table
