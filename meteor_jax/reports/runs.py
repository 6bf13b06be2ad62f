"""What an evaluation left in a workdir, as a report needs it."""

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
from meteor_jax.evaluation.results import COMBINED, PlanResult, Row, averages, layer_average
from meteor_jax.evaluation.token_stats import describe
from meteor_jax.evaluation.visualize import EXAMPLES_FOLDER, KEPT_FILE
from meteor_jax.experiment.plans import BLIND, MAJORITY
from meteor_jax.inference.draw import EXAMPLES_FILE

METRICS_FILE = "metrics.jsonl"
SHARE_STEPS = 20  # the last logged steps of training, whose shares are averaged


@dataclasses.dataclass(frozen=True)
class Run:
    """One eval.json and what lies beside it.

    Attributes:
        name: for tables; the folder's name, or its path from a common one where two have the same.
        content: the file as read.
    """

    path: Path
    name: str
    content: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def step(self) -> int | None:
        return self.content.get("step")

    @property
    def versions(self) -> Mapping[str, str]:
        return self.content.get("versions", {})

    @property
    def device(self) -> str:
        """What it ran on, as far as it was recorded."""
        devices = self.content.get("devices", {})
        known = {"count", "kind"} <= set(devices)
        return f"{devices['count']} × {devices['kind']}" if known else ""

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(row.task for row in self.rows))

    @property
    def tasks(self) -> list[str]:
        """Without those that join others."""
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
        return sum(self._of(self.plan_names[0], "n"))

    def mean_score(self, plan: str) -> float | None:
        """Percent, mean over the tasks; None for a plan that did not run."""
        score = averages(self.rows).get(plan)
        return None if score is None else 100 * score["all"]

    def mean(self, plan: str, field: str) -> float:
        """A field of the rows, mean over the tasks; 0 for a plan that did not run."""
        return float(np.mean(self._of(plan, field) or [0.0]))

    def tokens_kept(self, plan: str) -> float:
        return self.mean(plan, "visual_tokens_kept")

    def tokens_computed(self, plan: str) -> float:
        return self.mean(plan, "visual_tokens_computed")

    def _of(self, plan: str, field: str) -> list[float]:
        rows = [row for row in self.rows if row.plan == plan and row.group != COMBINED]
        return [getattr(row, field) for row in rows]

    @cached_property
    def kept(self) -> Mapping[str, Mapping[str, Any]]:
        """By plan and task, how many tokens the questions kept (`kept.kept_tokens`); counted from
        the predictions where the file does not say."""
        if "kept_tokens" in self.content:
            return self.content["kept_tokens"]
        counted = {plan: self._count_kept(plan) for plan in self.model_plans}
        return {plan: by_task for plan, by_task in counted.items() if by_task}

    def _count_kept(self, plan: str) -> dict[str, Any]:
        decode = self.content.get("plans", {}).get(plan, {}).get("decode") or {}
        depth = self.content.get("config", {}).get("model", {}).get("llama", {}).get("depth")
        fused = self._of(plan, "visual_tokens_fused")
        if depth is None or not fused:
            return {}
        result = PlanResult(
            plan,
            (),
            visual_tokens_fused=fused[0],
            layers=tuple(decode.get("layers", ())),
            depth=depth,
        )
        kept: dict[str, list[tuple[int, ...]]] = {}
        for record in self.predictions(plan):
            if not record.get("corrupt"):
                kept.setdefault(record["task"], []).append(tuple(record["kept"]))
        return {
            task: {
                "mean_over_layers": describe([layer_average(k, result=result) for k in counts]),
                "cuts": [describe(cut) for cut in zip(*counts, strict=True)],
            }
            for task, counts in kept.items()
        }

    def predictions(self, plan: str) -> list[dict[str, Any]]:
        """The plan's answers, or nothing where none lie where the file says."""
        path = self.content.get("predictions", {}).get(plan)
        return _read_lines(self.folder / path) if path else []

    @property
    def _is_newest(self) -> bool:
        """Pictures lie beside the newest evaluation only."""
        return self.path.name == EVAL_FILE

    @property
    def examples_folder(self) -> Path:
        return self.folder / EXAMPLES_FOLDER

    @cached_property
    def examples(self) -> list[dict[str, Any]]:
        """What `draw_examples` listed, of those whose picture is there."""
        path = self.examples_folder / EXAMPLES_FILE
        has_any = self._is_newest and path.is_file()
        listed = json.loads(path.read_text(encoding="utf-8")) if has_any else []
        return [one for one in listed if (self.examples_folder / one["picture"]).is_file()]

    @property
    def kept_picture(self) -> Path | None:
        path = self.folder / KEPT_FILE
        return path if self._is_newest and path.is_file() else None

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """By plan, the share of each encoder in the tokens that enter the LLM."""
        return self._shares[0]

    @property
    def shares_from(self) -> str:
        """Where `shares` come from."""
        return self._shares[1]

    @cached_property
    def _shares(self) -> tuple[dict[str, dict[str, float]], str]:
        if "encoder_share" in self.content:
            return self.content["encoder_share"], "over all images"
        if shares := self._shares_of_training():
            return shares, f"of the last {SHARE_STEPS} logged steps of training"
        counts: dict[str, dict[str, int]] = {}
        for example in self.examples:
            total = counts.setdefault(example.get("plan", "examples"), {})
            for encoder, count in example["kept"].get("fusion", {}).items():
                total[encoder] = total.get(encoder, 0) + count
        shares = {
            plan: {encoder: count / sum(total.values()) for encoder, count in total.items()}
            for plan, total in counts.items()
        }
        return shares, f"of the {len(self.examples)} examples drawn below"

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
    return [_read_run(path, name=name) for path, name in zip(paths, names, strict=True)]


def _read_run(path: Path, *, name: str) -> Run:
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
            f"{path}: all its tasks are answered for submission and none has a score; name "
            f"evaluations with a scored task."
        )
    known = {field.name for field in dataclasses.fields(Row)}
    built = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: rows[{i}]: {expected}, got {row!r}.")
        # Later versions may say more of a row than this one knows.
        fields = {key: value for key, value in row.items() if key in known}
        built.append(build(Row, fields, where=f"{path}: rows[{i}]"))
    return Run(path=path, name=name, content=content, rows=tuple(built))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
