"""Text files that are whole or absent, and what stands in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from meteor_jax import __version__
from meteor_jax.evaluation.results import Answer
from meteor_jax.evaluation.tasks import Question

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
