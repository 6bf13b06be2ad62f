"""Which tasks are evaluated, and which questions stand for them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from meteor_jax.config import ConfigError, suggest
from meteor_jax.data.records import TaskSpec
from meteor_jax.data.sources import TASKS


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a test split; `record` is its image's index in the source."""

    task: TaskSpec
    record: int
    image_id: int
    question_id: int
    question: str
    answer: str

    @property
    def image(self) -> tuple[str, int]:
        """What two questions about one image have in common."""
        return self.task.source, self.record


def combined_name(source: str) -> str:
    """The name under which all tasks of a source stand together: `easyvqa_all`."""
    return f"{_plain(source)}_all"


def resolve_tasks(
    names: Sequence[str],
    *,
    sources: Sequence[str],
    registry: Mapping[str, TaskSpec] = TASKS,
) -> tuple[TaskSpec, ...]:
    """The tasks that `names` stand for, each once, in the registry's order.

    A name is "all" or a group ("knowledge", "general", "reading"), which mean the tasks of
    `sources`; or a task; or a whole source ("easy_vqa", "easyvqa_all", "reading_all").

    Raises:
        ConfigError: for a name that is none of these, with the nearest that is, and for a group
            without a task in `sources`.
    """
    groups = {task.group for task in registry.values()}
    by_source = {combined_name(task.source): task.source for task in registry.values()}
    chosen = set()
    for name in names:
        if name in registry:
            found = [registry[name]]
        elif name == "all" or name in groups:
            found = [
                task
                for task in registry.values()
                if task.source in sources and name in ("all", task.group)
            ]
            if not found:
                raise ConfigError(
                    f"tasks: no task of '{name}' in the config's sources ({', '.join(sources)}); "
                    "name a task or a source."
                )
        else:
            source = by_source.get(name) or by_source.get(combined_name(name))
            if source is None:
                valid = ["all", *groups, *registry, *by_source]
                near = suggest(name, valid)
                raise ConfigError(f"tasks: no task, group or source '{name}'.{near}")
            found = [task for task in registry.values() if task.source == source]
        chosen |= {task.name for task in found}
    if not chosen:
        raise ConfigError("tasks: none named; write --tasks=all.")
    return tuple(task for name, task in registry.items() if name in chosen)


def collect_questions(
    source: Sequence[Mapping[str, Any]],
    *,
    tasks: Sequence[TaskSpec],
    num_questions: int | None = None,
    seed: int = 0,
) -> tuple[Question, ...]:
    """The questions of `tasks`, those about one image side by side.

    With `num_questions`, images are visited in an order drawn from `seed`, and each task takes
    the first so many questions it meets: the same ones for every plan and every checkpoint.

    Raises:
        ValueError: if a task has no question here.
    """
    wanted = {task.name: task for task in tasks}
    left = dict.fromkeys(wanted, np.inf if num_questions is None else num_questions)
    order = range(len(source))
    if num_questions is not None:
        order = np.random.default_rng(seed).permutation(len(source)).tolist()
    questions = []
    for record in order:
        if not any(left.values()):
            break
        image = source[record]
        for item in image["qa"]:
            if left.get(item["task"], 0) > 0:
                left[item["task"]] -= 1
                questions.append(
                    Question(
                        task=wanted[item["task"]],
                        record=record,
                        image_id=image["image_id"],
                        question_id=item["question_id"],
                        question=item["question"],
                        answer=item["answer"],
                    )
                )
    found = Counter(question.task.name for question in questions)
    missing = [name for name in wanted if not found[name]]
    if missing:
        names = ", ".join(missing)
        raise ValueError(f"tasks: no test question of {names} in {len(source)} images.")
    return tuple(questions)


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")
