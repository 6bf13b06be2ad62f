"""A config file as one typed `Experiment`."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from meteor_jax.config import ConfigError, build
from meteor_jax.data.config import DataConfig, Task
from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.models.family import ModelConfig
from meteor_jax.parallel.mesh import MeshConfig
from meteor_jax.pruning.plan import PrunePlan


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of training: what is shown, what learns, and how.

    Attributes:
        task: "captioning" (an image and its caption), "instruction" (a conversation), or
            "classification" (a question and which of `data.classes` answers it).
        template: how a conversation becomes text; see `data.templates`.
        text_length: text places of a row; 0 takes `data.text_length`.
        plans: names of plans; the steps alternate between them, on the same parameters.
        steps: optimizer steps; 0 leaves the stage out.
        batch_size: rows of one step, over all devices.
        grad_accum_steps: parts of a batch, whose gradients are summed one after the other, to save
            memory.
        learning_rate: the peak.
        warmup_ratio: share of the steps over which the learning rate rises.
        lr_multipliers: (pattern, multiplier); the first pattern found in a parameter's
            path scales its learning rate.
        trainable: patterns; parameters whose path holds none of them are frozen.
        reinit: patterns; parameters whose path holds one of them are initialised again at the
            beginning of the stage; all others keep what the stage before taught them.
        grad_clip: largest global norm of the gradient; 0 does not clip.
        calibrate_before: measures the ranks that rank-guided plans need before the stage's first
            step, with the parameters as they are then.
    """

    task: Task = "instruction"
    template: str = "qa"
    text_length: int = 0
    plans: tuple[str, ...] = ("full",)
    steps: int = 0
    batch_size: int = 32
    grad_accum_steps: int = 1
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.03
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    trainable: tuple[str, ...] = (".*",)
    reinit: tuple[str, ...] = ()
    weight_decay: float = 0.0
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    grad_clip: float = 1.0
    calibrate_before: bool = False

    def __post_init__(self) -> None:
        if self.grad_accum_steps < 1 or self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into grad_accum_steps="
                f"{self.grad_accum_steps} parts."
            )
        if not self.plans:
            raise ValueError("plans is empty: name at least one plan, such as 'full'.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Training as a whole.

    Attributes:
        pretrain, finetune: the stages, in this order.
        ema_decay: decay of the moving average of the parameters, which is then what is evaluated;
            0 keeps none.
        log_every: steps between fetches of the metrics from the device.
        eval_every: steps between evaluations; 0 evaluates at the end only.
        eval_questions: of each task, in evaluations before the end.
        checkpoint_every: steps between checkpoints; 0 saves at the end only.
        max_to_keep: how many of the newest to keep.
        held_out_every: steps between measurements of the loss on `data.held_out` records, which
            are also made at the end of each stage; 0 makes none.
        held_out_batches: how many batches, at most, are measured.
    """

    pretrain: StageConfig = StageConfig(task="captioning")
    finetune: StageConfig = StageConfig()
    ema_decay: float = 0.0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    log_every: int = 10
    eval_every: int = 0
    eval_questions: int = 100
    checkpoint_every: int = 0
    max_to_keep: int = 2
    held_out_every: int = 0
    held_out_batches: int = 8

    def __post_init__(self) -> None:
        for name in ("log_every", "held_out_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}.")
        if not self.stages():
            raise ValueError("nothing to train: set pretrain.steps or finetune.steps.")

    def stages(self) -> tuple[Stage, ...]:
        """The stages that have steps."""
        stages, start = [], 0
        for name in ("pretrain", "finetune"):
            config = getattr(self, name)
            if config.steps:
                stages.append(Stage(name, config, start=start, stop=start + config.steps))
            start += config.steps
        return tuple(stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that the step of that number belongs to; past the end, the last one."""
        stages = self.stages()
        return next((stage for stage in stages if step < stage.stop), stages[-1])


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage and the global steps that it spans: start, …, stop − 1."""

    name: str
    config: StageConfig
    start: int
    stop: int

    def plan_name(self, step: int) -> str:
        """The plan of a global step."""
        return self.config.plans[(step - self.start) % len(self.config.plans)]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole config file.

    Attributes:
        plans: plan texts by name, as calls or JSON; see `pruning.text`. A config file may give
            `PrunePlan` objects.
        init_from: workdirs, of runs or converted, whose parameters this run starts from: each
            fills the parts of the model that it holds, what none holds starts from nothing.
        seed: of the parameters' start and, added to `data.seed`, of the order of the data.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    plans: dict[str, str] = dataclasses.field(default_factory=dict)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    init_from: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train.held_out_every and not self.data.held_out:
            raise ConfigError(
                f"train.held_out_every is {self.train.held_out_every}, but data.held_out is 0: say "
                "how many records of each source are kept out of training."
            )


def load_experiment(config: Any) -> Experiment:
    """The experiment in an ml_collections ConfigDict or a nested dict.

    Raises:
        ConfigError: one line naming the field, what was expected, and the nearest valid name.
    """
    values = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    if isinstance(values.get("plans"), dict):
        values["plans"] = {
            name: plan.to_json(indent=None) if isinstance(plan, PrunePlan) else plan
            for name, plan in values["plans"].items()
        }
    return build(Experiment, values)


def complete(config: ConfigDict) -> ConfigDict:
    """`config` with every field that it leaves out at its default, for the end of `get_config`.

    A field must be in the ConfigDict to be set on the command line.
    """
    values = {}
    experiment = load_experiment(config)
    for field in dataclasses.fields(experiment):
        value = getattr(experiment, field.name)
        value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        values[field.name] = _with_placeholders(value)
    return ConfigDict(values)


def _with_placeholders(value: Any) -> Any:
    """ConfigDict gives a field that is None the type of None, and nothing else could be set."""
    if isinstance(value, dict):
        return {name: _with_placeholders(item) for name, item in value.items()}
    return placeholder(object) if value is None else value
