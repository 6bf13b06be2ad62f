"""Where stage 3 may cut: how far each layer's attention depends on the question.

    python -m meteor_jax.tools.cut_layers --config=configs/small.py --workdir=runs/small \\
        --plan=meteor

Two questions about one image are asked, and one cut after another is put behind every layer, alone.
A layer whose attention keeps the same tokens whatever is asked does not guide a cut by the text.

Q questions, K kept tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from meteor_jax.checkpoint import restore_params
from meteor_jax.data import pipeline
from meteor_jax.data.tokenizers import load_tokenizer
from meteor_jax.evaluation.config import CALIBRATION_FILE
from meteor_jax.evaluation.runner import TOKENIZER_FOLDER, param_shapes
from meteor_jax.models.cost import count_cost
from meteor_jax.models.meteor import Meteor
from meteor_jax.parallel import make_mesh
from meteor_jax.pruning.baselines import parse_plan
from meteor_jax.pruning.plan import Calibration, DecodePlan, PrunePlan
from meteor_jax.tools.calibrate import CalibrationBatch, calibration_batch, cut_traces
from meteor_jax.training.experiment import Experiment, load_experiment, parse_flags

QUESTIONS_PER_IMAGE = 2


@dataclasses.dataclass(frozen=True)
class CutLayer:
    """What a cut before one layer would do.

    Attributes:
        layer: the cut is before it.
        same: share of the kept tokens that stay whichever of the questions is asked.
        chance: that share if each question's tokens were drawn by chance: K / N.
        value: mean of the visual attention value, and its 5th and 95th percentile over the
            questions: the mass on the image of the heads that count, which sets an adaptive K.
    """

    layer: int
    same: float
    chance: float
    value: tuple[float, float, float]


def measure_cut_layers(
    model: Meteor, params: Any, *, plan: PrunePlan, batch: CalibrationBatch,
    groups: Sequence[int], share: float = 0.5,
) -> list[CutLayer]:
    """One `CutLayer` for each layer but the first.

    Args:
        plan: its stages 1 and 2, and how its stage 3 scores (queries, heads, rotation, which
            layer's attention); a plan without stage 3 takes the defaults.
        batch: a `CalibrationBatch`; groups: of each row, the number of its image.
        share: of the visual tokens, what the cut keeps.
    """
    decode = plan.decode or DecodePlan(layers=(1,), keep=(1,))
    entering = count_cost(model.config, dataclasses.replace(plan, decode=None)).visual_tokens_mean
    keep = max(round(share * entering), 1)
    found = []
    for layer in track(range(1, model.config.llama.depth), "Cutting before layer"):
        cut = dataclasses.replace(
            decode, layers=(layer,), keep=(keep,), budget="fixed", recycle=0.0, scale=()
        )
        (trace,) = cut_traces(model, params, batch, plan=dataclasses.replace(plan, decode=cut))
        values = np.sort(trace.visual_attention_value, axis=1)
        counted = min(decode.heads, values.shape[1]) if decode.heads else values.shape[1]
        values = values[:, -counted:].mean(1)
        low, high = np.percentile(values, (5, 95))
        found.append(
            CutLayer(
                layer=layer, same=kept_alike(trace.visual, groups=groups),
                chance=keep / entering, value=(float(values.mean()), float(low), float(high)),
            )
        )
    return found


def kept_alike(kept: np.ndarray, *, groups: Sequence[int]) -> float:
    """The mean share of kept tokens that any two rows of one group have in common.

    Shapes:
        kept: int[Q, K], indices of tokens; −1 is none.

    Raises:
        ValueError: if no group has two rows.
    """
    sets = [set(row[row >= 0].tolist()) for row in kept]
    shares = [
        len(sets[a] & sets[b]) / len(sets[a])
        for a, b in itertools.combinations(range(len(sets)), 2)
        if groups[a] == groups[b]
    ]
    if not shares:
        raise ValueError("expected two questions or more about an image, got one about each.")
    return float(np.mean(shares))


def main(argv: list[str]) -> int:
    """Returns the exit code: 2, after one line, for what the user can put right."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument '{argv[1]}'; flags start with --.")
        if not 0 < SHARE.value < 1:
            raise ValueError(f"--share: expected a share between 0 and 1, got {SHARE.value}.")
        found = _measure_workdir(load_experiment(CONFIG.value), workdir=Path(WORKDIR.value))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    table = Table(
        "cut before layer", "kept whatever is asked", "by chance", "VAV", "5 % – 95 %",
        title=f"plan '{PLAN.value}', {SHARE.value:.0%} of its tokens kept",
    )
    for row in found:
        mean, low, high = row.value
        table.add_row(
            str(row.layer), f"{row.same:.0%}", f"{row.chance:.0%}", f"{mean:.2f}",
            f"{low:.2f} – {high:.2f}",
        )
    Console().print(table)
    return 0


def _measure_workdir(experiment: Experiment, *, workdir: Path) -> list[CutLayer]:
    plan = parse_plan(PLAN.value, library=experiment.plans)
    plan = plan.calibrated(Calibration.load(workdir / CALIBRATION_FILE))
    if plan.decode is not None and plan.decode.criterion != "text_attention":
        raise ValueError(
            f"plan '{plan.name}' cuts by '{plan.decode.criterion}', not by attention; give one "
            "whose decode.criterion is text_attention."
        )
    model, mesh = Meteor(experiment.model), make_mesh(experiment.train.mesh)
    with jax.set_mesh(mesh):
        params = restore_params(workdir, param_shapes(experiment, mesh=mesh))
        tokenizer = load_tokenizer(experiment.data.tokenizer, folder=workdir / TOKENIZER_FOLDER)
        records = pipeline.open_sources(experiment.data, split="test")
        batch = calibration_batch(
            experiment, tokenizer=tokenizer, records=records, of_image=QUESTIONS_PER_IMAGE
        )
        groups = [row // QUESTIONS_PER_IMAGE for row in range(len(batch.tokens))]
        return measure_cut_layers(
            model, params, plan=plan, batch=batch, groups=groups, share=SHARE.value
        )


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
    WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
    PLAN = flags.DEFINE_string("plan", "meteor", "Whose stages 1 and 2, and way to score.")
    SHARE = flags.DEFINE_float("share", 0.5, "Of the visual tokens, what the cut keeps.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
