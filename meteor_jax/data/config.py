"""What data a run trains on, and how it is laid out."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from meteor_jax.config import suggest
from meteor_jax.data.templates import get_template

Task = Literal["captioning", "instruction", "classification"]
Attention = Literal["causal", "independent_qa"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on, and how it is laid out.

    Fields:
        sources: names of data sources (see `sources.open_source`), mixed by `weights` (equal
            where empty).
        tasks: that each source is for; empty, or "any" for one, is for all.
        classes: answers that the task "classification" tells apart, for families that do.
        num_images: images of each source's training split; empty, or None for one, takes all.
        held_out: the last so many records of each source never train.
        image_size: pixels a side. text_length: T, an image counts as one token.
        questions_per_image: turns at most in a training conversation, where a source has
            questions; a source of conversations gives them whole.
        attention: among the questions of such a conversation: "causal", each sees those before it
            (LLaVA); "independent_qa", each sees the images alone, as if it were the only one
            (Molmo, arXiv:2409.17146, section 3), which is how evaluation asks. With "causal",
            earlier answers can leak later ones. Splash attention does not take the mask of
            "independent_qa", so TPUs run XLA's.
        max_images: of one row; an example with more is skipped.
        tokenizer: "byte", "bpe:SIZE" or a folder. template: see `templates.TEMPLATES`.
        caption_question: what asks for a caption, in templates that keep the question.
        num_workers: processes that prepare batches (absl flags must be parsed, and the launcher
            have a `__main__` guard); 0 prepares them in threads.
        prefetch: batches prepared ahead (by each worker).
        seed: of the order of examples and questions. source_seed: of generated pictures.
        record_cache_size: encoded records that stay in memory once read (in each worker), which
            halves the time that later epochs take; 0 keeps none.
        data_dir: where sources keep their files.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...] = ()
    tasks: tuple[Literal["captioning", "instruction", "classification", "any"], ...] = ()
    classes: tuple[str, ...] = ()
    num_images: tuple[int | None, ...] = ()
    held_out: int = 0
    image_size: int = 64
    text_length: int = 256
    questions_per_image: int = 8
    attention: Attention = "causal"
    max_images: int = 1
    tokenizer: str = "byte"
    template: str = "qa"
    caption_question: str = "Describe the image."
    seed: int = 0
    source_seed: int = 0
    num_workers: int = 0
    prefetch: int = 4
    record_cache_size: int = 16384
    data_dir: str = "~/tensorflow_datasets"

    def __post_init__(self):
        get_template(self.template)
        if self.attention not in get_args(Attention):
            hint = suggest(self.attention, get_args(Attention))
            raise ValueError(f"attention: no mode '{self.attention}'.{hint}")
        if not self.sources:
            raise ValueError("sources: expected at least one name.")
        for name in ("weights", "tasks", "num_images"):
            given = getattr(self, name)
            if given and len(given) != len(self.sources):
                raise ValueError(
                    f"{name}: expected one for each of {len(self.sources)} sources, "
                    f"got {len(given)}."
                )
        if any(weight <= 0 for weight in self.weights):
            raise ValueError(f"weights: expected positive numbers, got {self.weights}.")
        for name in ("image_size", "text_length", "questions_per_image", "max_images", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        if self.held_out < 0:
            raise ValueError(f"held_out: expected at least 0, got {self.held_out}.")

    def attention_of(self, task: Task) -> Attention:
        """The attention of a stage's rows: one caption or question a row is causal."""
        return self.attention if task == "instruction" else "causal"
