"""What an evaluation is asked to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from meteor_jax.checkpoint import CALIBRATION_FILE
from meteor_jax.data.sources.records import TaskSpec
from meteor_jax.evaluation.tasks.registry import resolve_tasks
from meteor_jax.experiment.config import Experiment
from meteor_jax.experiment.eval_config import EvalConfig, prompt_template
from meteor_jax.experiment.plans import resolve_plans
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """What is to be evaluated, all names resolved."""

    config: EvalConfig
    tasks: tuple[TaskSpec, ...]
    plans: tuple[PrunePlan, ...]
    template: str


def check_request(
    experiment: Experiment,
    *,
    source_dir: str | Path,
    tasks: Sequence[str] | None = None,
    plans: Sequence[str] | None = None,
    num_questions: int | None = None,
) -> EvaluationRequest:
    """Resolves every name before anything costly happens; see `evaluate_checkpoint`.

    Raises:
        ConfigError: one line, for an unknown task, plan or field, or a template that drops the
            question.
    """
    config = experiment.eval
    if tasks is not None:
        config = dataclasses.replace(config, tasks=tuple(tasks))
    if plans is not None:
        config = dataclasses.replace(config, plans=tuple(plans))
    if num_questions is not None:
        config = dataclasses.replace(config, num_questions=num_questions)
    template = prompt_template(config.template or experiment.train.finetune.template)
    calibration = Calibration.load(Path(source_dir) / CALIBRATION_FILE)
    return EvaluationRequest(
        config=config,
        tasks=resolve_tasks(config.tasks, sources=experiment.data.sources),
        plans=resolve_plans(config.plans, library=experiment.plans, calibration=calibration),
        template=template,
    )
