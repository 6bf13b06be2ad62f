"""Which tasks are evaluated, and which questions stand for them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from meteor_jax.config import ConfigError, suggest
from meteor_jax.data.sources.records import Records, TaskSpec
from meteor_jax.data.sources.registry import TASKS, open_source
from meteor_jax.evaluation.tasks.benchmarks.datasets import FOLDERS, Folder
from meteor_jax.evaluation.tasks.benchmarks.parquet import ParquetSource, open_folder
from meteor_jax.evaluation.tasks.benchmarks.prompts import Item
from meteor_jax.evaluation.tasks.benchmarks.registry import BENCHMARKS, GROUPS, Benchmark
from meteor_jax.evaluation.tasks.scoring.registry import SCORERS

REGISTRY: dict[str, TaskSpec] = TASKS | {name: row.task for name, row in BENCHMARKS.items()}


def register_benchmark(folder: Folder, benchmark: Benchmark) -> None:
    """Adds a benchmark that is evaluated by its own name (CONTRIBUTING.md has an example).

    Raises:
        ConfigError: for a name that is taken, or a metric that does not exist.
    """
    task = benchmark.task
    if task.name in REGISTRY or FOLDERS.get(folder.name, folder) != folder:
        raise ConfigError(f"task '{task.name}' or folder '{folder.name}' exists; rename yours.")
    if task.metric not in SCORERS:
        raise ConfigError(
            f"task '{task.name}': no metric '{task.metric}'.{suggest(task.metric, SCORERS)}"
        )
    FOLDERS[folder.name] = folder
    BENCHMARKS[task.name] = benchmark
    REGISTRY[task.name] = task


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a test split.

    Attributes:
        record: index in the source of the record that holds its images.
        question: the prompt's text; `<image>` only where an image stands inside of it.
        answer: the first reference answer. references: all of them; that one alone where none are
            given.
        detail: what scoring, aggregation and submission need beside it, such as its category.
    """

    task: TaskSpec
    record: int
    image_id: int
    question_id: int | str
    question: str
    answer: str
    references: tuple[str, ...] = ()
    detail: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    num_images: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "references", self.references or (self.answer,))

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
    registry: Mapping[str, TaskSpec] = REGISTRY,
) -> tuple[TaskSpec, ...]:
    """The tasks that `names` stand for, each once, in the registry's order.

    A name is a task; a whole source of ours ("easy_vqa", "easyvqa_all", "reading_all"); or a
    group. "all", "knowledge", "general" and "reading" mean the tasks of `sources` where these have
    some. Otherwise they mean the benchmarks, as "benchmarks" (all of them), "paper11", "ocr" and
    "grounding" always do.

    Raises:
        ConfigError: for a name that is none of these, with the nearest that is, and for a group
            without a task.
    """
    ours = [task for task in registry.values() if task.name not in BENCHMARKS]
    groups = {"all", *GROUPS, *(task.group for task in ours)}
    by_source = {combined_name(task.source): task.source for task in ours}
    chosen = set()
    for name in names:
        source = by_source.get(name) or by_source.get(combined_name(name))
        if name in registry:
            found = [registry[name]]
        elif name in groups:
            found = [
                task for task in ours if task.source in sources and name in ("all", task.group)
            ] or [registry[task] for task in GROUPS.get(name, ()) if task in registry]
            if not found:
                raise ConfigError(
                    f"tasks: no task of '{name}' in the config's sources ({', '.join(sources)}); "
                    "name a task or a source."
                )
        elif source is not None:
            found = [task for task in ours if task.source == source]
        else:
            near = suggest(name, [*groups, *registry, *by_source])
            raise ConfigError(f"tasks: no task, group or source '{name}'.{near}")
        chosen |= {task.name for task in found}
    if not chosen:
        raise ConfigError("tasks: none named; write --tasks=all.")
    return tuple(task for name, task in registry.items() if name in chosen)


def open_task_source(
    task: TaskSpec, *, data_dir: str | Path, num_images: int | None = None, seed: int = 0
) -> Records:
    """The records that a task asks about; tasks of one `source` share them.

    Args:
        num_images: the first so many; see `open_source` for what None means.
        seed: of generated pictures.

    Raises:
        ConfigError: for a benchmark that is not in `data_dir`, with the command that gets it.
    """
    if task.source in FOLDERS:
        return open_folder(FOLDERS[task.source], data_dir=data_dir, num_images=num_images)
    return open_source(
        task.source, split=task.split, data_dir=data_dir, num_images=num_images, seed=seed
    )


def open_sources(
    tasks: Sequence[TaskSpec], *, data_dir: str | Path, num_images: int | None, seed: int
) -> dict[str, Records]:
    """By name, the sources of all `tasks`; see `open_task_source`."""
    return {
        task.source: open_task_source(task, data_dir=data_dir, num_images=num_images, seed=seed)
        for task in {task.source: task for task in tasks}.values()
    }


def collect_questions(
    source: Records,
    *,
    tasks: Sequence[TaskSpec],
    num_questions: int | None = None,
    seed: int = 0,
) -> tuple[Question, ...]:
    """The questions of `tasks`, those about one image side by side.

    With `num_questions`, images are visited in an order drawn from `seed`, and each task takes
    the first so many questions it meets: the same ones for every plan and every checkpoint.
    Questions that count together, such as MME's pairs, are taken together or not at all.

    Raises:
        ValueError: if a task has no question here.
    """
    if isinstance(source, ParquetSource):
        return _collect_benchmark(source, tasks, num_questions=num_questions, seed=seed)
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
    _check_found(questions, tasks, source=source)
    return tuple(questions)


def _collect_benchmark(
    source: ParquetSource, tasks: Sequence[TaskSpec], *, num_questions: int | None, seed: int
) -> tuple[Question, ...]:
    rows = [BENCHMARKS[task.name] for task in tasks]
    columns = dict.fromkeys(column for row in rows for column in row.columns)
    columns |= dict.fromkeys(row.only[0] for row in rows if row.only)
    questions: dict[str, list[Question]] = {task.name: [] for task in tasks}
    for record, number, row in source.questions(tuple(columns)):
        for benchmark in rows:
            if benchmark.only is None or row[benchmark.only[0]] in benchmark.only[1]:
                questions[benchmark.task.name] += [
                    _from_item(item, benchmark, record=record, number=number)
                    for item in benchmark.items(row)
                ]
    if num_questions is not None:
        questions = {
            name: _draw_units(of_task, num_questions, num_records=len(source), seed=seed)
            for name, of_task in questions.items()
        }
    found = [question for of_task in questions.values() for question in of_task]
    _check_found(found, tasks, source=source)
    return tuple(sorted(found, key=lambda question: question.record))


def _from_item(item: Item, benchmark: Benchmark, *, record: int, number: int) -> Question:
    return Question(
        task=benchmark.task,
        record=record,
        image_id=record,
        question_id=number if item.question_id is None else item.question_id,
        question=item.prompt,
        answer=item.references[0] if item.references else "",
        references=item.references,
        detail=item.detail,
        num_images=item.num_images,
    )


def _draw_units(
    questions: Sequence[Question], limit: int, *, num_records: int, seed: int
) -> list[Question]:
    """At most `limit` of one task, by images in a random order; units whole, but at least one."""
    place = np.random.default_rng(seed).permutation(num_records)
    units: dict[Hashable, list[Question]] = {}
    for question in sorted(questions, key=lambda question: place[question.record]):
        key = question.detail.get("group_id", len(units))
        units.setdefault(key, []).append(question)
    drawn: list[Question] = []
    for unit in units.values():
        if not drawn or len(drawn) + len(unit) <= limit:
            drawn += unit
    return drawn


def _check_found(
    questions: Sequence[Question], tasks: Sequence[TaskSpec], *, source: Records
) -> None:
    found = Counter(question.task.name for question in questions)
    missing = [task.name for task in tasks if not found[task.name]]
    if missing:
        names = ", ".join(missing)
        raise ValueError(f"tasks: no test question of {names} in {len(source)} images.")


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")
