"""Where the benchmarks' pictures and questions are published, as parquet with the images inside.

Columns are those of the published schemas: an image is a struct of `bytes` and `path`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meteor_jax.evaluation.tasks.benchmarks.prompts import mmmu_images

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Folder:
    """One split of one published data set.

    Attributes:
        name: of the source, and so of `TaskSpec.source`.
        repo: data set on the Hugging Face hub; its last part names the folder.
        split, config: how its files are called: `[config/]split-*.parquet`.
        images: columns that hold images, each one or a list.
        same_image: columns that are equal where the image is; () where each row has its own. The
            image column itself compares the bytes.
        order: of a row, the columns of its images in their order; with the columns it reads.
        image_config, image_id: where images lie in rows of their own, their config and the column
            that a question's `same_image` refers to.
    """

    name: str
    repo: str
    split: str
    config: str = ""
    images: tuple[str, ...] = ("image",)
    same_image: tuple[str, ...] = ()
    order: Callable[[Row], tuple[str, ...]] | None = None
    order_columns: tuple[str, ...] = ()
    image_config: str = ""
    image_id: str = ""

    @property
    def directory(self) -> str:
        return self.repo.rpartition("/")[2]

    def download_command(self, data_dir: str | Path) -> str:
        """The one command that gets everything this split needs."""
        configs = [config for config in (self.config, self.image_config) if config]
        patterns = [f"*{config}/{self.split}-*" for config in configs] or [f"*{self.split}-*"]
        include = " ".join(f"--include '{pattern}'" for pattern in patterns)
        return (
            f"hf download {self.repo} --repo-type dataset {include} "
            f"--local-dir {Path(data_dir) / self.directory}"
        )


_MMMU = tuple(f"image_{number}" for number in range(1, 8))
_PAGE = ("ucsf_document_id", "ucsf_document_page_no")

FOLDERS: dict[str, Folder] = {
    folder.name: folder
    for folder in (
        Folder("scienceqa_img", "lmms-lab/ScienceQA", "test", config="ScienceQA-IMG"),
        Folder("ai2d", "lmms-lab/ai2d", "test", same_image=("image",)),
        Folder(
            "mmmu_val", "lmms-lab/MMMU", "validation", images=_MMMU,
            order=mmmu_images, order_columns=("question", "options"),
        ),
        Folder("mathvista_testmini", "AI4Math/MathVista", "testmini", images=("decoded_image",)),
        Folder("mme", "lmms-lab/MME", "test", same_image=("category", "question_id")),
        Folder("mmbench_en_dev", "lmms-lab/MMBench", "dev", config="en", same_image=("image",)),
        Folder("seedbench", "lmms-lab/SEED-Bench", "test"),
        Folder(
            "gqa", "lmms-lab/GQA", "testdev", config="testdev_balanced_instructions",
            same_image=("imageId",), image_config="testdev_balanced_images", image_id="id",
        ),
        Folder("pope", "lmms-lab/POPE", "test", same_image=("image_source",)),
        Folder("vqav2_val", "lmms-lab/VQAv2", "validation", same_image=("image_id",)),
        Folder("vqav2_test", "lmms-lab/VQAv2", "test", same_image=("image_id",)),
        Folder("vizwiz_val", "lmms-lab/VizWiz-VQA", "val"),
        Folder("vizwiz_test", "lmms-lab/VizWiz-VQA", "test"),
        Folder("textvqa_val", "lmms-lab/textvqa", "validation", same_image=("image_id",)),
        Folder("chartqa", "lmms-lab/ChartQA", "test", same_image=("image",)),
        Folder("docvqa_val", "lmms-lab/DocVQA", "validation", config="DocVQA", same_image=_PAGE),
        Folder("docvqa_test", "lmms-lab/DocVQA", "test", config="DocVQA", same_image=_PAGE),
        Folder(
            "infovqa_val", "lmms-lab/DocVQA", "validation", config="InfographicVQA",
            same_image=("image_url",),
        ),
        Folder(
            "infovqa_test", "lmms-lab/DocVQA", "test", config="InfographicVQA",
            same_image=("image_url",),
        ),
        Folder("ocrbench", "echo840/OCRBench", "test"),
        Folder("realworldqa", "lmms-lab/RealWorldQA", "test"),
        Folder("mmvp", "lmms-lab-eval/MMVP", "train"),
        Folder("refcoco_val", "lmms-lab/RefCOCO", "val"),
    )
}  # fmt: skip
