"""The fields of `config.eval`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from meteor_jax.config import ConfigError
from meteor_jax.data.sources.records import TaskSpec
from meteor_jax.data.templates import get_template
from meteor_jax.parallel.mesh import MeshConfig, parse_mesh


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The config's `eval`.

    Attributes:
        tasks: names as `resolve_tasks` takes them.
        plans: names or texts as `parse_plan` takes them. "blind" (the text-only baseline: the
            question without its image) and "majority" (each task's most frequent answer) are always
            added.
        num_questions: of each task; None asks all.
        num_images: of each test split; None takes all, or the source's default.
        template: of the prompts; "" takes that of the finetune stage.
        prompt_lengths: text tokens that prompts are padded to; each one that is used is compiled
            once. The longest prompt must fit the last.
        max_new_tokens: an answer is cut off there, where its task says nothing else.
        max_new_tokens_limit: cuts off the answers of every task, to save memory; None does not.
        encode_batch_size, batch_size: static sizes of encoding and answering, over all
            devices; rounded up to as many for each of the mesh's data × fsdp shards.
        visual_cache_images: images whose visual tokens are on the devices at once.
        num_visualizations: answers in kept_tokens.png and examples/; 0 draws none.
        seed: of the choice of questions.
        mesh: devices along each axis, as fields or as text ("data=8,tensor=4"); "auto" splits
            layers over as few devices as their memory asks for (`inference.layout`).
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
            "max_new_tokens",
            "encode_batch_size",
            "batch_size",
            "visual_cache_images",
            "num_questions",
            "max_new_tokens_limit",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"eval.{name} is at least 1, got {value}.")
        lengths = self.prompt_lengths
        if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
            raise ConfigError(f"eval.prompt_lengths: expected ascending lengths, got {lengths}.")

    def new_tokens(self, task: TaskSpec) -> int:
        """Tokens at which an answer to a task's question is cut off."""
        asked = task.max_new_tokens or self.max_new_tokens
        return min(asked, self.max_new_tokens_limit or asked)


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
