"""What an evaluation is asked to do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from meteor_jax.checkpoint import CALIBRATION_FILE
from meteor_jax.config import ConfigError, build
from meteor_jax.data.records import TaskSpec
from meteor_jax.data.templates import get_template
from meteor_jax.evaluation.results import BLIND, MAJORITY
from meteor_jax.evaluation.schedule import BatchSizes
from meteor_jax.evaluation.tasks import resolve_tasks
from meteor_jax.parallel import MeshConfig, parse_mesh
from meteor_jax.pruning.baselines import parse_plan
from meteor_jax.pruning.plan import Calibration, PrunePlan, override
from meteor_jax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The config's `eval`.

    Attributes:
        tasks: names as `resolve_tasks` takes them.
        plans: names or texts as `parse_plan` takes them. "blind" (the question without its
            image) and "majority" (each task's most frequent answer) are always added.
        num_questions: of each task; None asks all.
        num_images: of each test split; None takes all, or the source's default.
        template: of the prompts; "" takes that of the finetune stage.
        prompt_lengths: text tokens that prompts are padded to; each one that is used is compiled
            once. The longest prompt must fit the last.
        max_new_tokens: an answer is cut off there, where its task says nothing else.
        max_new_tokens_limit: cuts off the answers of every task, to save memory; None does not.
        encode_batch_size, batch_size: static sizes of encoding and answering, over all
            devices; rounded up to as many for each of the mesh's data × fsdp lanes.
        visual_cache_images: images whose visual tokens lie on the devices at once.
        num_visualizations: answers in kept_tokens.png and examples/; 0 draws none.
        seed: of the choice of questions.
        mesh: devices along each axis, as fields or as text ("data=8,tensor=4"); "auto" splits
            layers over as few devices as their memory asks for (`evaluation.layout`).
        param_dtype: of the matrices of the model; "auto" is the computation's, `model.dtype`.
    """

    tasks: tuple[str, ...] = ("all",)
    plans: tuple[str, ...] = ("full",)
    num_questions: int | None = None
    num_images: int | None = None
    template: str = ""
    prompt_lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    max_new_tokens: int = 16
    max_new_tokens_limit: int | None = None
    encode_batch_size: int = 16
    batch_size: int = 32
    visual_cache_images: int = 64
    num_visualizations: int = 6
    seed: int = 0
    mesh: MeshConfig | str = "auto"
    param_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.mesh, str) and self.mesh != "auto":
            object.__setattr__(self, "mesh", parse_mesh(self.mesh, where="eval.mesh"))
        for name in (
            "max_new_tokens", "encode_batch_size", "batch_size", "visual_cache_images"
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"eval.{name} is at least 1, got {getattr(self, name)}.")
        for name in ("num_questions", "max_new_tokens_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}.")
        lengths = self.prompt_lengths
        if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
            raise ConfigError(f"eval.prompt_lengths: expected ascending lengths, got {lengths}.")

    def new_tokens(self, task: TaskSpec) -> int:
        """Tokens at which an answer to a task's question is cut off."""
        asked = task.max_new_tokens or self.max_new_tokens
        return min(asked, self.max_new_tokens_limit or asked)

    def sizes(self, *, lanes: int) -> BatchSizes:
        """The static sizes on so many lanes."""
        images, questions = (
            math.ceil(size / lanes) * lanes
            for size in (self.encode_batch_size, self.batch_size)
        )
        return BatchSizes(images=images, questions=questions, group=self.visual_cache_images)


def eval_config(experiment: Experiment) -> EvalConfig:
    """The experiment's `eval` fields, checked.

    Raises:
        ConfigError: naming an unknown or ill-typed field.
    """
    return build(EvalConfig, experiment.eval, where="config.eval")


def resolve_plans(
    texts: Sequence[str], *, library: Mapping[str, str], calibration: Calibration
) -> tuple[PrunePlan, ...]:
    """The plans that `texts` name, calibrated; "blind" and "majority" are left out.

    Two plans of one name, such as `fastv(keep=8),fastv(keep=16)`, are told apart by their texts.

    Raises:
        ConfigError: for an unknown plan or field, or one that is named twice.
    """
    plans: dict[str, PrunePlan] = {}
    for text in texts:
        if text in (BLIND, MAJORITY):
            continue
        plan = parse_plan(text, library=library)
        if plan.name in plans:
            plan = override(plan, name=text.replace(" ", ""))
        if plan.name in plans:
            raise ConfigError(f"plan '{text}' is named twice; name each plan once.")
        plans[plan.name] = plan.calibrated(calibration)
    return tuple(plans.values())


@dataclasses.dataclass(frozen=True)
class Request:
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
) -> Request:
    """Resolves every name before anything costly happens; see `evaluate_checkpoint`.

    Raises:
        ConfigError: one line, for an unknown task, plan or field, or a template that drops the
            question.
    """
    config = eval_config(experiment)
    if tasks is not None:
        config = dataclasses.replace(config, tasks=tuple(tasks))
    if plans is not None:
        config = dataclasses.replace(config, plans=tuple(plans))
    if num_questions is not None:
        config = dataclasses.replace(config, num_questions=num_questions)
    template = prompt_template(config.template or experiment.train.finetune.template)
    calibration = Calibration.load(Path(source_dir) / CALIBRATION_FILE)
    return Request(
        config=config,
        tasks=resolve_tasks(config.tasks, sources=experiment.data.sources),
        plans=resolve_plans(config.plans, library=experiment.plans, calibration=calibration),
        template=template,
    )


def prompt_template(name: str) -> str:
    """`name`, if questions can be asked in it.

    Raises:
        ConfigError: for a template that drops the question; ValueError: for one that is not there.
    """
    if not get_template(name).keeps_question:
        raise ConfigError(
            f"template '{name}' drops the question: set eval.template, or "
            "train.finetune.template, to one that keeps it, such as 'qa'."
        )
    return name
