"""The benchmarks: one row a task."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from meteor_jax.data.sources.records import Group, TaskSpec
from meteor_jax.evaluation.tasks.benchmarks import prompts
from meteor_jax.evaluation.tasks.benchmarks.datasets import FOLDERS
from meteor_jax.evaluation.tasks.benchmarks.prompts import COGNITION, PERCEPTION, Item
from meteor_jax.evaluation.tasks.scoring.registry import SUBMISSION


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A task over the rows of a folder.

    Attributes:
        items: a row's questions.
        columns: that `items` reads.
        only: a column and the values of it that rows of the task have.
        in_groups: False for a variant that is asked by its own name only.
    """

    task: TaskSpec
    items: Callable[[Mapping[str, Any]], Iterator[Item]]
    columns: tuple[str, ...]
    only: tuple[str, tuple[str, ...]] | None = None
    in_groups: bool = True


def _row(
    name: str,
    source: str,
    group: Group,
    metric: str,
    new_tokens: int,
    make: Callable[..., Any],
    columns: str,
    *,
    aggregation: str = "mean",
    only: tuple[str, tuple[str, ...]] | None = None,
    in_groups: bool = True,
) -> Benchmark:
    task = TaskSpec(
        name,
        source,
        group,
        metric,
        max_new_tokens=new_tokens,
        aggregation=aggregation,
        split=FOLDERS[source].split,
    )
    return Benchmark(task, make, tuple(columns.split(",")), only, in_groups)


_MMBENCH = "index,question,hint,A,B,C,D,answer,category"
_VQA = "question_id,question,answers"
_DOCUMENT = "questionId,question,answers"

# Name, source, group, metric, most new tokens, rows' questions, columns.
BENCHMARKS: dict[str, Benchmark] = {
    row.task.name: row
    for row in (
        _row("scienceqa_img", "scienceqa_img", "knowledge", "scienceqa", 16, prompts.scienceqa,
             "hint,question,choices,answer"),
        _row("ai2d", "ai2d", "knowledge", "ai2d", 16, prompts.ai2d, "question,options,answer"),
        _row("mmmu_val", "mmmu_val", "knowledge", "mmmu", 16, prompts.mmmu,
             "id,question,options,answer,question_type"),
        _row("mathvista_testmini_rules", "mathvista_testmini", "knowledge", "mathvista_rules",
             1024, prompts.mathvista,
             "pid,question,unit,choices,answer,precision,question_type,answer_type"),
        _row("mme_perception", "mme", "general", "mme", 16, prompts.mme,
             "question_id,question,answer,category", aggregation="mme",
             only=("category", PERCEPTION)),
        _row("mme_cognition", "mme", "general", "mme", 16, prompts.mme,
             "question_id,question,answer,category", aggregation="mme",
             only=("category", COGNITION)),
        _row("mmbench_en_dev_rules_circular", "mmbench_en_dev", "general", "mmbench_rules", 1024,
             prompts.mmbench, _MMBENCH, aggregation="mmbench_circular"),
        _row("mmbench_en_dev_static", "mmbench_en_dev", "general", "mmbench_static", 1024,
             prompts.mmbench, _MMBENCH, aggregation="mmbench_circular", in_groups=False),
        _row("seedbench_image", "seedbench", "general", "first_letter", 1024, prompts.seedbench,
             "question_id,question,choice_a,choice_b,choice_c,choice_d,answer",
             only=("data_type", ("image",))),
        _row("gqa", "gqa", "general", "exact_match_strict", 16, prompts.gqa, "id,question,answer"),
        _row("pope", "pope", "general", "pope", 128, prompts.pope, "id,question,answer,category",
             aggregation="pope"),
        *(
            _row(f"pope_{subset}", "pope", "general", "pope", 128, prompts.pope,
                 "id,question,answer,category", aggregation="pope", only=("category", (subset,)),
                 in_groups=False)
            for subset in ("random", "popular", "adversarial")
        ),
        _row("vqav2_val", "vqav2_val", "general", "vqav2", 16, prompts.vqav2, _VQA),
        _row("vqav2_test", "vqav2_test", "general", SUBMISSION, 16, prompts.vqav2, _VQA,
             in_groups=False),
        _row("vizwiz_vqa_val", "vizwiz_val", "general", "vqa", 1024, prompts.vizwiz, _VQA),
        _row("vizwiz_vqa_test", "vizwiz_test", "general", SUBMISSION, 1024, prompts.vizwiz, _VQA,
             in_groups=False),
        _row("realworldqa", "realworldqa", "general", "realworldqa", 16, prompts.realworldqa,
             "question,answer"),
        _row("mmvp", "mmvp", "general", "mmvp", 16, prompts.mmvp,
             "Index,Question,Options,Correct Answer", aggregation="mmvp_pairs"),
        _row("textvqa_val", "textvqa_val", "ocr", "vqa", 1024, prompts.textvqa, _VQA),
        _row("textvqa_val_ocr", "textvqa_val", "ocr", "vqa", 1024,
             functools.partial(prompts.textvqa, with_ocr=True), f"{_VQA},ocr_tokens",
             in_groups=False),
        _row("chartqa", "chartqa", "ocr", "relaxed_chartqa", 16, prompts.chartqa,
             "question,answer,type"),
        *(
            _row(f"chartqa_{part}", "chartqa", "ocr", "relaxed_chartqa", 16, prompts.chartqa,
                 "question,answer,type", only=("type", (f"{part}_test",)), in_groups=False)
            for part in ("human", "augmented")
        ),
        _row("docvqa_val", "docvqa_val", "ocr", "anls_of_documents", 32, prompts.docvqa, _DOCUMENT),
        _row("docvqa_test", "docvqa_test", "ocr", SUBMISSION, 32, prompts.docvqa, _DOCUMENT,
             in_groups=False),
        _row("infovqa_val", "infovqa_val", "ocr", "anls_of_documents", 32, prompts.docvqa,
             _DOCUMENT),
        _row("infovqa_test", "infovqa_test", "ocr", SUBMISSION, 32, prompts.docvqa, _DOCUMENT,
             in_groups=False),
        _row("ocrbench", "ocrbench", "ocr", "ocrbench", 128, prompts.ocrbench,
             "dataset,question,question_type,answer", aggregation="ocrbench_sum"),
        _row("refcoco_val_boxes", "refcoco_val", "grounding", "box_hit", 64, prompts.refcoco,
             "question_id,answer,bbox,image"),
    )
}  # fmt: skip

# METEOR's table: seven of its eleven are known by their numbers. The other four are our reading:
# MMBench, SEED-Bench and ChartQA fit its averages by group, MMMU is a guess.
PAPER11 = (
    "scienceqa_img", "ai2d", "gqa", "pope", "textvqa_val", "docvqa_val", "ocrbench",
    "mmbench_en_dev_rules_circular", "seedbench_image", "chartqa", "mmmu_val",
)  # fmt: skip


def _groups() -> dict[str, tuple[str, ...]]:
    asked = [row.task for row in BENCHMARKS.values() if row.in_groups]
    by_group = {
        group: tuple(task.name for task in asked if task.group == group)
        for group in dict.fromkeys(task.group for task in asked)
    }
    everything = tuple(task.name for task in asked)
    return {"paper11": PAPER11, "all": everything, "benchmarks": everything} | by_group


GROUPS: dict[str, tuple[str, ...]] = _groups()
