"""What an evaluation wrote into a workdir, as a report needs it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from meteor_jax.config import ConfigError, build
from meteor_jax.evaluation.files import EVAL_FILE
from meteor_jax.evaluation.results import COMBINED, Row, averages
from meteor_jax.evaluation.visualize import EXAMPLES_FILE, EXAMPLES_FOLDER
from meteor_jax.experiment.plans import BLIND, MAJORITY
from meteor_jax.reports.page import ABSENT

METRICS_FILE = "metrics.jsonl"
SHARE_STEPS = 20  # shares are averaged over this many last logged steps of training


@dataclasses.dataclass(frozen=True)
class Run:
    """One eval.json and the files of its folder.

    Attributes:
        name: for tables; the folder's name, or its path from a common one where two have the same.
        content: the file as read.
        is_only: whether the report is of this run alone.
    """

    path: Path
    name: str
    content: Mapping[str, Any]
    rows: tuple[Row, ...]
    is_only: bool = True

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def step(self) -> int | None:
        return self.content["step"]

    @property
    def versions(self) -> list[str]:
        return [f"{name} {version}" for name, version in self.content["versions"].items()]

    @property
    def devices(self) -> list[str]:
        """What it ran on: one entry, or none where it was not recorded."""
        devices = self.content.get("devices")
        return [f"{devices['count']} × {devices['kind']}"] if devices else []

    def label(self, plan: str) -> str:
        """The plan's name, after the run's where there are several."""
        return plan if self.is_only else f"{self.name}/{plan}"

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(row.task for row in self.rows))

    @property
    def tasks(self) -> list[str]:
        """Without those that combine others."""
        return list(dict.fromkeys(row.task for row in self.rows if row.group != COMBINED))

    @property
    def plan_names(self) -> list[str]:
        return list(dict.fromkeys(row.plan for row in self.rows))

    @property
    def model_plans(self) -> list[str]:
        """Plans that see the image."""
        return [plan for plan in self.plan_names if plan not in (BLIND, MAJORITY)]

    @property
    def pruned(self) -> list[str]:
        return [plan for plan in self.model_plans if plan != "full"]

    @property
    def num_questions(self) -> int:
        return int(sum(self._of(self.plan_names[0], "n")))

    @cached_property
    def averages(self) -> dict[str, dict[str, float]]:
        """`results.averages` of the rows."""
        return averages(self.rows)

    def mean_score(self, plan: str) -> float:
        """Percent, mean over the tasks."""
        return 100 * self.averages[plan]["all"]

    @property
    def full_score(self) -> float | None:
        """`mean_score` of the unpruned plan; None if that did not run."""
        return self.mean_score("full") if "full" in self.averages else None

    def mean(self, plan: str, field: str) -> float:
        """A field of the rows, mean over the tasks; 0 for a plan that did not run."""
        return float(np.mean(self._of(plan, field) or [0.0]))

    def by_task(self, plan: str) -> dict[str, Row]:
        return {row.task: row for row in self.rows if row.plan == plan}

    def tokens_kept(self, plan: str) -> float:
        return self.mean(plan, "visual_tokens_kept")

    def tokens_computed(self, plan: str) -> float:
        return self.mean(plan, "visual_tokens_computed")

    def _of(self, plan: str, field: str) -> list[float]:
        rows = [row for row in self.rows if row.plan == plan and row.group != COMBINED]
        return [getattr(row, field) for row in rows]

    @property
    def kept_tokens(self) -> Mapping[str, Mapping[str, Any]]:
        """By plan and task, how many tokens the questions kept: `token_stats.kept_tokens`."""
        return self.content.get("kept_tokens", {})

    def predictions(self, plan: str) -> list[dict[str, Any]]:
        """The plan's predictions; none where their file is missing."""
        path = self.content.get("predictions", {}).get(plan)
        return _read_lines(self.folder / path) if path else []

    @property
    def examples_folder(self) -> Path:
        return self.folder / EXAMPLES_FOLDER

    @cached_property
    def examples(self) -> list[dict[str, Any]]:
        """What `write_examples` listed, if its picture exists; of a folder's newest evaluation."""
        path = self.examples_folder / EXAMPLES_FILE
        has_any = self.path.name == EVAL_FILE and path.is_file()
        listed = json.loads(path.read_text(encoding="utf-8")) if has_any else []
        return [one for one in listed if (self.examples_folder / one["picture"]).is_file()]

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """By plan, the share of each encoder in the tokens that enter the LLM."""
        return self._shares[0]

    @property
    def shares_from(self) -> str:
        """What `shares` are measured over."""
        return self._shares[1]

    @cached_property
    def _shares(self) -> tuple[dict[str, dict[str, float]], str]:
        if shares := self._shares_of_training():
            return shares, f"over the last {SHARE_STEPS} logged steps of training"
        counts: dict[str, dict[str, int]] = {}
        for example in self.examples:
            total = counts.setdefault(example["plan"], {})
            for encoder, count in example["kept"].get("fusion", {}).items():
                total[encoder] = total.get(encoder, 0) + count
        shares = {
            plan: {encoder: count / sum(total.values()) for encoder, count in total.items()}
            for plan, total in counts.items()
        }
        return shares, f"over the {len(self.examples)} examples drawn below"

    def _shares_of_training(self) -> dict[str, dict[str, float]]:
        steps: dict[str, list[dict[str, float]]] = {}
        for line in _read_lines(self.folder / METRICS_FILE):
            share = {k.split("/", 1)[1]: v for k, v in line.items() if k.startswith("fused_share/")}
            if share and "plan" in line:
                steps.setdefault(line["plan"], []).append(share)
        return {
            plan: {
                encoder: float(np.mean([share[encoder] for share in shares[-SHARE_STEPS:]]))
                for encoder in shares[-1]
            }
            for plan, shares in steps.items()
        }


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The evaluations at `paths`, each an eval.json or a folder that holds one.

    Raises:
        ConfigError: if a path is no eval.json.
    """
    paths = [Path(path) / EVAL_FILE if Path(path).is_dir() else Path(path) for path in paths]
    # The newest evaluation of a folder is called as the folder, another one by its file too.
    places = [path.resolve() for path in paths]
    names = [place.parent.name for place in places]
    if any(place.name != EVAL_FILE for place in places):
        names = [f"{place.parent.name}/{place.stem}" for place in places]
    if len(set(names)) < len(names):
        places = [place.parent if place.name == EVAL_FILE else place for place in places]
        common = os.path.commonpath(places)
        names = [os.path.relpath(place, common) for place in places]
    only = len(paths) == 1
    return [_read_run(path, name=name, only=only) for path, name in zip(paths, names, strict=True)]


def percent_of(part: float, whole: float) -> str:
    """`part` as a percentage of `whole`, or a dash where that is 0."""
    return f"{100 * part / whole:.0f} %" if whole else ABSENT


def _read_run(path: Path, *, name: str, only: bool) -> Run:
    expected = "expected a file that evaluate.py wrote"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; {expected}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: {expected}, got no JSON ({error}).") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: {expected}, got JSON without 'rows'.")
    if not rows:
        raise ConfigError(
            f"{path}: all its tasks are for submission, none has a score; name evaluations "
            f"with a scored task."
        )
    built = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: rows[{i}]: {expected}, got {row!r}.")
        built.append(build(Row, row, where=f"{path}: rows[{i}]"))
    return Run(path=path, name=name, content=content, rows=tuple(built), is_only=only)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
