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

from meteor_jax.evaluation.evaluator import Evaluation
from meteor_jax.evaluation.files import prediction_line
from meteor_jax.evaluation.results import PlanResult
from meteor_jax.inference.draw import Stage, draw_kept_tokens, read_stages
from meteor_jax.inference.engine.run import pad_prompts
from meteor_jax.models.eagle.model import Meteor, MeteorConfig
from meteor_jax.parallel.distributed import is_main_process
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Array, PruneTrace

KEPT_FILE = "kept_tokens.png"
EXAMPLES_FOLDER, EXAMPLES_FILE = "examples", "examples.json"


def draw_answers(
    evaluation: Evaluation, result: PlanResult, *, plan: PrunePlan, workdir: Path
) -> None:
    """kept_tokens.png and examples/: `eval.num_visualizations` answers, half of them incorrect.

    Only questions about one image that could be decoded are drawn.
    """
    rows = [
        row
        for row, answer in enumerate(result.answers)
        if len(evaluation.asks[row].images) == 1 and not answer.corrupt
    ]
    chosen = choose_examples(
        [result.answers[row].score for row in rows],
        [evaluation.questions[row].image for row in rows],
        count=evaluation.config.num_visualizations,
    )
    rows = [rows[index] for index in chosen]
    if not rows:
        return
    asks = [evaluation.asks[row] for row in rows]
    images = np.stack(
        [evaluation.decode_image(evaluation.read_image(ask.images[0])) for ask in asks]
    )
    longest = max(ask.shape.prompt_length for ask in asks)
    prompts = pad_prompts(
        asks, np.arange(len(asks)), shape=dataclasses.replace(asks[0].shape, prompt_length=longest)
    )
    trace = trace_examples(
        evaluation.params,
        images,
        prompts.tokens,
        prompts.text_valid,
        model=evaluation.model,
        plan=plan,
    )
    trace = jax.device_get(evaluation.lanes.everywhere(trace))
    if not is_main_process():
        return
    records = [
        prediction_line(evaluation.questions[row], result.answers[row]) | {"plan": plan.name}
        for row in rows
    ]
    stages = read_stages(trace, grids=token_grids(evaluation.model.config, plan=plan))
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


def token_grids(config: MeteorConfig, *, plan: PrunePlan) -> dict[str, int]:
    """By encoder, in the order of `VisualTokens.encoder`, the side of its output grid."""
    if config.fusion == "pre":
        return {"all": config.grid}
    return {name: config.encoder(name).grid for name in config.active_encoders(plan)}


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def trace_examples(
    params: Any, images: Array, tokens: Array, text_valid: Array, *, model: Meteor, plan: PrunePlan
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
