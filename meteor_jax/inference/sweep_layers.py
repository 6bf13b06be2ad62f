"""Where a plan may prune in the decoder: what a step before each layer does to the answers.

Before each layer, alone, a step keeps half of the visual tokens: those that the text's attention
chooses, or as many at random, three times. Measured is the loss of the right answers, on
questions of the training split, so that no test question has a say in where a plan prunes.

B questions, A answer tokens, K kept tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Bool, Int32, UInt8

from meteor_jax.data import pipeline
from meteor_jax.data.config import DataConfig
from meteor_jax.data.sources.registry import CorruptImage, decode_image
from meteor_jax.data.templates import Conversation, get_template, render, with_images
from meteor_jax.data.tokenizers import Tokenizer
from meteor_jax.experiment.config import Experiment
from meteor_jax.experiment.eval_config import prompt_template
from meteor_jax.inference.budgets import encode_each
from meteor_jax.models.family import count_cost
from meteor_jax.parallel.distributed import allgather_to_host
from meteor_jax.progress import track
from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.methods.random import Random
from meteor_jax.pruning.methods.text_attention import TextAttention
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.points import before_layer
from meteor_jax.types import IGNORE_LABEL, AnyArray, Array, PruneStepTrace

QUESTIONS_PER_IMAGE = 2
BATCH_SIZE = 32  # questions
SEARCH = 20  # records of a source looked through for each image wanted
DRAWS = 3


class AskedBatch(flax.struct.PyTreeNode):
    """Prompts about one image each, and their answers. A row without an answer only fills up."""

    images: UInt8[AnyArray, "B H W 3"]
    tokens: Int32[AnyArray, "B T"]
    text_valid: Bool[AnyArray, "B T"]
    answers: Int32[AnyArray, "B A"]
    answer_valid: Bool[AnyArray, "B A"]


@dataclasses.dataclass(frozen=True)
class PruneLayer:
    """What a prune step before one layer does.

    Attributes:
        layer: the step is before it.
        loss: of the answers, in nats a token, if attention chooses what stays.
        losses_by_chance: the same if chance does, draw by draw.
        same: of what attention keeps, the share that two questions about one image have in common.
        value: the sum of the visual attention values of the heads that count, mean, 5th and 95th
            percentile over the questions; K of an adaptive plan is in proportion to it.
    """

    layer: int
    loss: float
    losses_by_chance: tuple[float, ...]
    same: float
    value: tuple[float, float, float]


def measure_prune_layers(
    model: Any,
    params: Any,
    *,
    plan: PrunePlan,
    batches: Sequence[AskedBatch],
    share: float = 0.5,
) -> tuple[float, list[PruneLayer]]:
    """The answers' loss without a step, and one `PruneLayer` for each layer but the first.

    Args:
        plan: its steps before the decoder, and how the first of its steps there scores (queries,
            heads, rotation, which layer's attention); METEOR's way where it has none.
        batches: `QUESTIONS_PER_IMAGE` rows after one another are about one image.
        share: of the visual tokens, what the step keeps.

    Raises:
        ValueError: if the plan's steps in the decoder do not score by attention.
    """
    first = (*plan.decoder_steps, Step(before_layer(1), TextAttention(), Fixed(1)))[0]
    if "attention_received" not in first.method.needs:
        raise ValueError(
            f"plan '{plan.name}' prunes by {first.method.name}; expected one that prunes by the "
            "text's attention, or not in the decoder."
        )
    unpruned = plan.without("decode")
    entering = count_cost(model.config, unpruned).visual_tokens_fused
    first = dataclasses.replace(first, budget=Fixed(max(round(share * entering), 1)))
    encoded = [encode_each(params, batch.images, model=model, plan=unpruned) for batch in batches]
    real = [np.asarray(batch.answer_valid).any(1) for batch in batches]
    tokens = sum(int(np.asarray(batch.answer_valid).sum()) for batch in batches)

    def answer(*steps: Step) -> tuple[float, list[PruneStepTrace]]:
        run = dataclasses.replace(unpruned, steps=unpruned.steps + steps)
        losses, traces = zip(
            *allgather_to_host(
                [
                    _answer(model, params, visual, batch, plan=run)
                    for visual, batch in zip(encoded, batches, strict=True)
                ]
            ),
            strict=True,
        )
        return float(sum(map(np.sum, losses)) / tokens), list(itertools.chain(*traces))

    found = []
    for layer in track(range(1, model.config.llama.depth), "Pruning before layer"):
        step = dataclasses.replace(first, at=before_layer(layer))
        loss, traces = answer(step)
        draws = (dataclasses.replace(step, method=Random(seed)) for seed in range(DRAWS))
        pairs = list(zip(traces, real, strict=True))
        values = np.concatenate([np.asarray(trace.budget_signal)[rows] for trace, rows in pairs])
        kept = np.concatenate([trace.visual[rows] for trace, rows in pairs])
        found.append(
            PruneLayer(
                layer=layer,
                loss=loss,
                losses_by_chance=tuple(answer(draw)[0] for draw in draws),
                same=kept_overlap(kept),
                value=(float(values.mean()), *np.percentile(values, (5, 95)).tolist()),
            )
        )
    return answer()[0], found


def kept_overlap(kept: np.ndarray, *, of_image: int = QUESTIONS_PER_IMAGE) -> float:
    """The mean share of a row's kept tokens that another row about the same image keeps too.

    Shapes:
        kept: int[B, K], indices of tokens, −1 is none; `of_image` rows after one another are
            about one image.
    """
    sets = [set(row[row >= 0].tolist()) for row in kept]
    return float(
        np.mean(
            [
                len(one & other) / len(one)
                for start in range(0, len(sets), of_image)
                for one, other in itertools.permutations(sets[start : start + of_image], 2)
            ]
        )
    )


@jax.jit(static_argnames=("model", "plan"))
def _answer(
    model: Any, params: Any, visual: Any, batch: AskedBatch, *, plan: PrunePlan
) -> tuple[Array, Any]:
    """The sum of each answer's losses, float32[B], and what the plan's steps did. The prompt alone
    chooses what stays; the answer comes after, as in generation."""
    variables = {"params": params}
    rows, length = batch.answers.shape
    read = model.apply(
        variables,
        visual,
        image_valid=jnp.ones((rows, 1), bool),
        tokens=batch.tokens,
        text_valid=batch.text_valid,
        plan=plan,
        max_new_tokens=length,
        method="prefill",
    )
    said = model.apply(variables, read.cache, batch.answers, method="extend")
    logits = jnp.concatenate([read.logits[:, None], said.logits[:, :-1]], axis=1)
    right = jnp.take_along_axis(
        jax.nn.log_softmax(logits), batch.answers[..., None], axis=2
    ).squeeze(2)
    return -jnp.where(batch.answer_valid, right, 0).sum(1), read.prune_steps


def asked_batches(
    experiment: Experiment, *, tokenizer: Tokenizer, num_images: int
) -> list[AskedBatch]:
    """Questions about the first `num_images` images of each source's training split.

    An image that cannot be decoded is left out, with its questions; an answer is cut where
    evaluation would stop. The last batch is filled up with rows that have no answer.

    Raises:
        ValueError: no image with so many questions, or a prompt longer than `data.text_length`.
    """
    config, of_evaluation = experiment.data, experiment.eval
    name = prompt_template(of_evaluation.template or experiment.train.finetune.template)
    records = pipeline.open_sources(config)
    served = [records[index] for index in pipeline.sources_for(config, "instruction")]
    chosen = pipeline.first_questions(
        served, count=num_images, of_image=QUESTIONS_PER_IMAGE, search=SEARCH * num_images
    )
    seen = [(asked, image) for asked in chosen if (image := _decode(asked, config)) is not None]
    if not seen:
        raise ValueError(
            f"expected images with {QUESTIONS_PER_IMAGE} questions or more in "
            f"{', '.join(config.sources)}, found none."
        )
    layout, answers = get_template(name), []
    for asked, _ in seen:
        turn = (with_images(asked.question, 1, template=layout), asked.answer)
        labels = render(Conversation((turn,)), template=layout, tokenizer=tokenizer).labels
        answer = [label for label in labels if label != IGNORE_LABEL]
        answers.append(answer[: of_evaluation.max_new_tokens])
    size, longest = min(BATCH_SIZE, len(seen)), max(map(len, answers))
    batches = []
    for start in range(0, len(seen), size):
        part = seen[start : start + size]
        prompts = pipeline.collate_prompts(
            [asked.question for asked, _ in part],
            tokenizer=tokenizer,
            template=name,
            text_length=config.text_length,
            batch_size=size,
        )
        images = [image for _, image in part]
        tokens, valid = np.zeros((size, longest), np.int32), np.zeros((size, longest), bool)
        for row, answer in enumerate(answers[start : start + size]):
            tokens[row, : len(answer)], valid[row, : len(answer)] = answer, True
        batches.append(
            AskedBatch(
                np.stack(images + [images[-1]] * (size - len(images))),
                prompts.tokens,
                prompts.text_valid,
                tokens,
                valid,
            )
        )
    return batches


def _decode(asked: pipeline.Asked, config: DataConfig) -> np.ndarray | None:
    try:
        return decode_image(asked.image, size=config.image_size)
    except CorruptImage as error:
        logging.warning("left out: %s", error)
        return None
