"""Text files that are whole or absent, and what stands in them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from meteor_jax import __version__
from meteor_jax.evaluation.results import Answer, PlanResult, Row, averages
from meteor_jax.evaluation.tasks.registry import Question
from meteor_jax.pruning.plan import PrunePlan

EVAL_FILE = "eval.json"  # of the newest evaluation; `kept_file` is for those before it
PREDICTIONS_FOLDER = "predictions"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def versions() -> dict[str, str]:
    """Of the packages that answers depend on."""
    # Our own from the source: a clone runs without being installed.
    return {"meteor_jax": __version__} | {name: version(name) for name in PACKAGES}


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(map(json_line, lines)))


def json_line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def prediction_line(question: Question, answer: Answer) -> dict[str, Any]:
    """What a line of predictions says."""
    return {
        "task": question.task.name,
        "question_id": question.question_id,
        "image_id": question.image_id,
        "question": question.question,
        "answer": question.answer,
        "prediction": answer.prediction,
        "score": answer.score,
        "kept": list(answer.kept),
        "computed": list(answer.computed),
        "prompt_tokens": answer.prompt_tokens,
        "prompt_length": answer.prompt_length,
        "num_images": answer.num_images,
        "rows": answer.rows,
        "corrupt": answer.corrupt,
        "non_finite": answer.non_finite,
    }


def file_name(plan: str) -> str:
    """A plan's name without what file systems dislike: `fastv(layer=2,keep=8)` → `fastv_layer…`."""
    return re.sub(r"[^\w.=-]+", "_", plan).strip("_")


def write_eval(
    path: Path,
    rows: Sequence[Row],
    *,
    config: Mapping[str, Any],
    plans: Sequence[PrunePlan],
    step: int | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """eval.json: config, plans, versions, rows and averages; the file is whole or absent.

    Args:
        details: more fields, by name.
    """
    content = {
        "step": step,
        "config": config,
        "plans": {plan.name: json.loads(plan.to_json()) for plan in plans},
        "versions": versions(),
        **(details or {}),
        "rows": [dataclasses.asdict(row) for row in rows],
        "averages": averages(rows),
    }
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def kept_file(workdir: Path, *, step: int | None, params: str) -> Path:
    """Where a checkpoint's eval.json is kept, whatever is evaluated after it: `eval_step_7.json`,
    with the digest `params` in its name where other parameters of that step have the file."""
    path = workdir / ("eval_no_step.json" if step is None else f"eval_step_{step}.json")
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["params"] != params:
        return path.with_name(f"{path.stem}-{params}.json")
    return path


def write_predictions(folder: Path, questions: Sequence[Question], result: PlanResult) -> Path:
    """`<plan>.jsonl` in `folder`: one object a question. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(result.plan)}.jsonl"
    write_lines(path, map(prediction_line, questions, result.answers))
    return path
