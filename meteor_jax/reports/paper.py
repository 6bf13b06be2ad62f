"""The table of METEOR's paper, as a reference for one's own.

METEOR (ICCV 2025, arXiv 2507.20842), Vicuna-7B, 1.8M examples of fine-tuning, as its readers quote
it: full-size models trained on other data than most that a report is made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# By column, how the names of our tasks may begin.
BENCHMARKS = {
    "SQA": "scienceqa",
    "AI2D": "ai2d",
    "GQA": "gqa",
    "POPE": "pope",
    "TextVQA": "textvqa",
    "DocVQA": "docvqa",
    "OCRBench": "ocrbench",
}
COLUMNS = ("method", "tokens", "TFLOPs", *BENCHMARKS, "average of 11")
ROWS = (
    ("EAGLE", 1024, 26.21, 71.0, 72.2, 64.8, 88.4, 71.7, 73.2, 538, 69.3),
    ("FastV", 256, 16.83, 70.5, 72.5, 61.8, 86.4, 70.5, 54.2, 431, 64.9),
    ("SparseVLM", 256, 17.89, 70.7, 72.2, 59.8, 86.5, 70.4, 51.9, 383, 63.9),
    ("METEOR", 242, 13.42, 71.4, 73.4, 63.5, 87.9, 71.1, 71.4, 533, 69.0),
)


def task_of(benchmark: str, tasks: Iterable[str]) -> str | None:
    """Which of our tasks is a column of the paper's; the shortest name where several are."""
    prefix = BENCHMARKS[benchmark]
    named = [task for task in tasks if re.sub(r"[^a-z0-9]", "", task.lower()).startswith(prefix)]
    return min(named, key=len, default=None)
