"""Pictures of an evaluation: some answers, correct and incorrect, with the kept tokens."""

from __future__ import annotations

import dataclasses
import functools
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from meteor_jax.evaluation.files import prediction_line
from meteor_jax.evaluation.results import PlanResult
from meteor_jax.evaluation.tasks.registry import Question
from meteor_jax.inference.draw import Stage, draw_kept_tokens, read_stages
from meteor_jax.inference.engine.engine import Engine, pad_prompts
from meteor_jax.inference.engine.images import read_pixels
from meteor_jax.inference.engine.request import Prompt
from meteor_jax.parallel.distributed import is_main_process
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Array, PruneTrace

KEPT_FILE = "kept_tokens.png"
EXAMPLES_FOLDER, EXAMPLES_FILE = "examples", "examples.json"


def draw_predictions(
    engine: Engine,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    result: PlanResult,
    *,
    plan: PrunePlan,
    grids: Mapping[str, int],
    count: int,
    workdir: Path,
) -> None:
    """kept_tokens.png and examples/: `count` predictions of `plan`, half of them incorrect.

    Only questions about one image that could be decoded are drawn.

    Args:
        grids: of `Family.token_grids`; nothing is drawn where there are none.
    """
    if not grids:
        return
    drawable = [
        i
        for i, found in enumerate(result.predictions)
        if len(prompts[i].images) == 1 and not found.unreadable
    ]
    chosen = choose_examples(
        [result.scores[i] for i in drawable], [questions[i].image for i in drawable], count=count
    )
    drawn = [drawable[index] for index in chosen]
    if not drawn:
        return
    predictor: Any = engine.predictors[plan.name]  # a `TextPredictor`
    asked = [prompts[i] for i in drawn]
    read = (read_pixels(prompt.images[0], size=predictor.image_size) for prompt in asked)
    images = np.stack([image for image in read if image is not None])
    longest = max(prompt.bucket.prompt_length for prompt in asked)
    rows = pad_prompts(
        asked,
        np.arange(len(asked)),
        bucket=dataclasses.replace(asked[0].bucket, prompt_length=longest),
    )
    trace = engine.shards.fetch(
        trace_examples(
            predictor.params,
            images,
            rows.tokens,
            rows.text_valid,
            model=predictor.model,
            plan=plan,
        )
    )
    if not is_main_process():
        return
    records = [
        prediction_line(questions[i], result.predictions[i], result.scores[i]) | {"plan": plan.name}
        for i in drawn
    ]
    stages = read_stages(trace, grids=grids)
    write_examples(workdir, images, records=records, stages=stages)


def write_examples(
    workdir: Path,
    images: np.ndarray,
    *,
    records: Sequence[Mapping[str, Any]],
    stages: Sequence[Sequence[Stage]],
) -> None:
    """kept_tokens.png, and in examples/ a picture per image and examples.json.

    The latter has the records, each with the name of its `picture` and with `kept`, its tokens by
    stage and encoder.

    Args:
        images: uint8[I, H, W, 3].
        records: lines of predictions with "plan", one per image.
        stages: by image, of `read_stages`.
    """
    folder = workdir / EXAMPLES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    pictures, listed = [], []
    for image, record, of_image in zip(images, records, stages, strict=True):
        picture = draw_kept_tokens(image, of_image, caption=caption(record))
        kept = {
            stage.title: {encoder: int(cells.sum()) for encoder, cells in stage.kept.items()}
            for stage in of_image
        }
        listed.append(dict(record) | {"picture": f"{len(listed):02d}.png", "kept": kept})
        picture.save(folder / listed[-1]["picture"])
        pictures.append(picture)
    Image.fromarray(np.concatenate(pictures)).save(workdir / KEPT_FILE)
    text = json.dumps(listed, indent=2, ensure_ascii=False) + "\n"
    (folder / EXAMPLES_FILE).write_text(text, encoding="utf-8")


def caption(record: Mapping[str, Any]) -> str:
    """Question, prediction, reference answer and plan of an example, in lines for its picture."""
    verdict = "correct" if record["score"] >= 0.5 else "incorrect"
    lines = (
        record["question"],
        f"predicted: {record['prediction']} ({verdict})",
        f"reference: {record['answer']}",
        f"plan: {record['plan']}",
    )
    return "\n".join(textwrap.fill(line, 34) for line in lines)


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def trace_examples(
    params: Any,
    images: Array,
    tokens: Array,
    text_valid: Array,
    *,
    model: Any,
    plan: PrunePlan,
) -> PruneTrace:
    """What `plan` keeps of some images, each with a question of its own.

    Shapes:
        images: uint8[I, H, W, 3]; tokens, text_valid: [I, T].
    """
    variables = {"params": params}
    encoded = model.apply(variables, images, plan=plan, method="encode_images")
    prefilled = model.apply(
        variables,
        jax.tree.map(lambda array: array[:, None], encoded.tokens),
        image_valid=jnp.ones((len(images), 1), bool),
        tokens=tokens,
        text_valid=text_valid,
        plan=plan,
        max_new_tokens=1,
        method="prefill",
    )
    return encoded.trace.replace(prune_steps=prefilled.prune_steps)


def choose_examples(scores: Sequence[float], images: Sequence[Any], *, count: int) -> list[int]:
    """Which answers to show: the first incorrect and the first correct ones, half of each, every
    one with another image. Where one kind has too few, the other fills in."""
    chosen: list[int] = []
    seen: set[Any] = set()
    left = {False: count - count // 2, True: count // 2}
    for fills_in in (False, True):
        for i, (score, image) in enumerate(zip(scores, images, strict=True)):
            is_right = score >= 0.5
            if len(chosen) < count and image not in seen and (fills_in or left[is_right]):
                left[is_right] -= 1
                chosen.append(i)
                seen.add(image)
    return sorted(chosen)
