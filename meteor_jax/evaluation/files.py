"""Text files that are whole or absent, and what stands in them."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from meteor_jax import __version__
from meteor_jax.evaluation.results import PlanResult, Row, averages
from meteor_jax.evaluation.tasks.benchmarks.submission import write_submissions
from meteor_jax.evaluation.tasks.registry import Question
from meteor_jax.evaluation.token_stats import kept_tokens
from meteor_jax.inference.engine.data_shards import DataShards
from meteor_jax.inference.engine.request import Prediction
from meteor_jax.pruning.plan import PrunePlan

EVAL_FILE = "eval.json"  # of the newest evaluation; `kept_file` is for those before it
PREDICTIONS_FOLDER = "predictions"
SUBMISSIONS_FOLDER = "submissions"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def versions() -> dict[str, str]:
    """Of the packages that answers depend on."""
    # Our own from the source: a clone runs without being installed.
    return {"meteor_jax": __version__} | {name: version(name) for name in PACKAGES}


def describe_devices(shards: DataShards) -> dict[str, Any]:
    return {
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
        "shards": shards.count,
        "mesh": dict(shards.mesh.shape) if shards.mesh else {},
    }


def count_bytes(params: Any) -> dict[str, int]:
    """Bytes of the parameters by dtype."""
    found: Counter[str] = Counter()
    for leaf in jax.tree.leaves(params):
        found[leaf.dtype.name] += leaf.nbytes
    return dict(found)


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(map(json_line, lines)))


def json_line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def prediction_line(question: Question, found: Prediction, score: float) -> dict[str, Any]:
    """What a line of predictions says."""
    return {
        "task": question.task.name,
        "question_id": question.question_id,
        "image_id": question.image_id,
        "question": question.question,
        "answer": question.answer,
        "prediction": found.text,
        "score": score,
        "kept": list(found.kept),
        "computed": list(found.computed),
        "prompt_tokens": found.prompt_tokens,
        "prompt_length": found.prompt_length,
        "num_images": found.num_images,
        "rows": found.batch_rows,
        "corrupt": found.unreadable,
        "non_finite": not found.finite,
    }


def read_line(line: Mapping[str, Any]) -> Prediction:
    """The prediction that a line of predictions holds."""
    return Prediction(
        text=line["prediction"],
        kept=tuple(line["kept"]),
        computed=tuple(line["computed"]),
        prompt_tokens=line["prompt_tokens"],
        prompt_length=line["prompt_length"],
        num_images=line["num_images"],
        batch_rows=line["rows"],
        unreadable=line["corrupt"],
        finite=not line["non_finite"],
        seconds=line.get("seconds", 0.0),
    )


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
    write_lines(path, map(prediction_line, questions, result.predictions, result.scores))
    return path


def write_results(
    workdir: Path,
    *,
    questions: Sequence[Question],
    results: Sequence[PlanResult],
    paths: Mapping[str, Path],
    rows: Sequence[Row],
    plans: Sequence[PrunePlan],
    step: int | None,
    config: Mapping[str, Any],
    details: Mapping[str, Any],
) -> None:
    """eval.json, the same under the checkpoint's own name, and submissions.

    Args:
        results: of `plans`, in their order; then those of the text-only baseline and of the
            majority.
        paths: by plan, its predictions; of a result without one they are written here.
    """
    paths = dict(paths)
    folder = next(iter(paths.values())).parent
    for result in results:
        if result.plan not in paths:
            paths[result.plan] = write_predictions(folder, questions, result)
    for result in results[: len(plans)]:
        write_submissions(
            workdir / SUBMISSIONS_FOLDER / file_name(result.plan),
            questions,
            [found.text for found in result.predictions],
        )
    write = functools.partial(
        write_eval,
        rows=rows,
        plans=plans,
        step=step,
        config=config,
        details={
            **details,
            "kept_tokens": kept_tokens(questions, results),
            "predictions": {
                plan: path.relative_to(workdir).as_posix() for plan, path in paths.items()
            },
        },
    )
    write(kept_file(workdir, step=step, params=details["params"]))
    write(workdir / EVAL_FILE)
