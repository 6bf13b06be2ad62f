"""Asks a model one plan's questions: images encoded once, every question alone.

The host decodes the next images while the device works, and answers are fetched one batch late,
so that neither waits for the other.

I images, G images of a group, B questions, T prompt tokens, N visual tokens, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.data.pipeline import Prompts
from meteor_jax.data.sources import CorruptImage
from meteor_jax.evaluation.results import Answer, score_answer
from meteor_jax.evaluation.tasks import Question
from meteor_jax.inference.generate import generate
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Array, VisualTokens

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Replies:
    """A batch's answers, still on the device.

    Shapes:
        tokens: int32[B, max_new_tokens]; num_tokens: int32[B].
        kept: int32[B] a cut in the LLM.
    """

    tokens: Array
    num_tokens: Array
    kept: tuple[Array, ...] = ()


class Answerer(Protocol):
    """A model under one plan. Every call has the same shapes, and returns before it is done."""

    sees_images: bool

    def encode(self, images: np.ndarray) -> VisualTokens:
        """VisualTokens of [I, N, D] for uint8[I, H, W, 3]."""

    def answer(
        self, visual: VisualTokens, tokens: np.ndarray, text_valid: np.ndarray
    ) -> Replies:
        """Replies to int32[B, T] prompts, each about its image in `visual`, [B, 1, N, D]."""


@dataclasses.dataclass(frozen=True)
class ModelAnswerer:
    """A `Meteor` and its parameters; see `Answerer`."""

    model: nn.Module
    params: Any
    plan: PrunePlan
    max_new_tokens: int
    eos_id: int
    sees_images: bool = True

    def encode(self, images: np.ndarray) -> VisualTokens:
        return encode_images(self.params, images, model=self.model, plan=self.plan)

    def answer(
        self, visual: VisualTokens, tokens: np.ndarray, text_valid: np.ndarray
    ) -> Replies:
        generated = generate(
            self.model,
            self.params,
            visual,
            image_valid=jnp.full((len(tokens), 1), self.sees_images),
            tokens=jnp.asarray(tokens),
            text_valid=jnp.asarray(text_valid),
            plan=self.plan,
            max_new_tokens=self.max_new_tokens,
            eos_id=self.eos_id,
        )
        return Replies(
            tokens=generated.tokens,
            num_tokens=generated.num_tokens,
            kept=tuple(cut.num_kept for cut in generated.cuts),
        )


@dataclasses.dataclass(frozen=True)
class BlindAnswerer(ModelAnswerer):
    """The model with no image: one visual token that is never read stands in for it."""

    sees_images: bool = False

    def encode(self, images: np.ndarray) -> VisualTokens:
        shape = fused_shape(self.model, self.params, plan=self.plan)
        return jax.tree.map(
            lambda leaf: jnp.zeros((len(images), 1, *leaf.shape[2:]), leaf.dtype), shape
        )


def fused_shape(model: nn.Module, params: Any, *, plan: PrunePlan) -> VisualTokens:
    """Shapes of one image's `encode_images`, [1, N, D], without computing it.

    Raises:
        ValueError: if the plan does not fit the model.
    """
    size = model.config.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    return jax.eval_shape(
        lambda params, images: model.apply(
            {"params": params}, images, plan=plan, method="encode_images"
        ).tokens,
        params,
        images,
    )


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def encode_images(
    params: Any, images: Array, *, model: nn.Module, plan: PrunePlan
) -> VisualTokens:
    """VisualTokens of [I, N, D] for uint8[I, H, W, 3]."""
    encoded = model.apply({"params": params}, images, plan=plan, method="encode_images")
    return encoded.tokens


@jax.jit
def join(parts: Sequence[VisualTokens]) -> VisualTokens:
    """[G, N, D] of batches of [I, N, D]."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


@jax.jit
def look_up(group: VisualTokens, slot: Array) -> VisualTokens:
    """[B, 1, N, D]: for every question the tokens of its image, int32[B] into the group."""
    return jax.tree.map(lambda array: jnp.take(array, slot, axis=0)[:, None], group)


@dataclasses.dataclass(frozen=True)
class Group:
    """Some images and all questions about them, as the host prepares them.

    Attributes:
        images: whole batches uint8[I, H, W, 3]; the last is padded by zeros.
        asked: questions by index; slot: int32, the image of each, counted through the batches.
        corrupt: questions whose image could not be decoded.
    """

    images: list[np.ndarray]
    asked: np.ndarray
    slot: np.ndarray
    corrupt: list[int]


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Static sizes: images encoded together, questions asked together, images kept at once."""

    images: int
    questions: int
    group: int


def make_groups(
    questions: Sequence[Question],
    *,
    load_image: Callable[[Question], np.ndarray],
    sizes: BatchSizes,
) -> Iterator[Group]:
    """The questions, group by group, with their images; questions about one image are adjacent.

    `load_image` raises `CorruptImage` where there is none to be had.
    """
    of_image: dict[tuple[str, int], list[int]] = {}
    for index, question in enumerate(questions):
        of_image.setdefault(question.image, []).append(index)
    members = list(of_image.values())
    for start in range(0, len(members), sizes.group):
        images, asked, slot, corrupt = [], [], [], []
        for indices in members[start : start + sizes.group]:
            try:
                image = load_image(questions[indices[0]])
            except CorruptImage:
                corrupt += indices
                continue
            asked += indices
            slot += [len(images)] * len(indices)
            images.append(image)
        yield Group(
            images=_batches(images, size=sizes.images),
            asked=np.array(asked, np.int64),
            slot=np.array(slot, np.int32),
            corrupt=corrupt,
        )


def answer_questions(
    questions: Sequence[Question],
    prompts: Prompts,
    answerer: Answerer,
    *,
    decode: Callable[[Sequence[int]], str],
    load_image: Callable[[Question], np.ndarray],
    sizes: BatchSizes,
    image_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[list[Answer], float]:
    """Asks everything; returns the answers in order, and the seconds a question took.

    A first batch of zeros compiles every program; its time is not counted. Rows that only fill
    up a batch are dropped again.

    Args:
        prompts: one row a question.
        decode: token ids to text.
        advance: told how many more questions have their answer.
    """
    answers: dict[int, Answer] = {}

    def settle(indices: np.ndarray, replies: Replies) -> None:
        tokens, num_tokens, kept = jax.device_get(
            (replies.tokens, replies.num_tokens, replies.kept)
        )
        for row, index in enumerate(indices.tolist()):
            prediction = decode(tokens[row, : num_tokens[row]].tolist()).strip()
            answers[index] = Answer(
                prediction=prediction,
                score=score_answer(questions[index], prediction),
                kept=tuple(int(cut[row]) for cut in kept),
                prompt_tokens=int(prompts.text_valid[index].sum()),
            )
        advance(len(indices))

    pending: deque[tuple[np.ndarray, Replies]] = deque()
    blank = answerer.encode(np.zeros((sizes.images, image_size, image_size, 3), np.uint8))
    per_group = -(-sizes.group // sizes.images)
    warm = look_up(join([blank] * per_group), np.zeros(sizes.questions, np.int32))
    first = np.zeros(sizes.questions, np.int64)
    jax.block_until_ready(
        answerer.answer(warm, prompts.tokens[first], prompts.text_valid[first]).tokens
    )
    begin = time.perf_counter()
    for group in prefetch(make_groups(questions, load_image=load_image, sizes=sizes)):
        for index in group.corrupt:
            answers[index] = Answer(prediction="", score=0.0, corrupt=True)
        advance(len(group.corrupt))
        if not len(group.asked):
            continue
        parts = [blank] * per_group
        if answerer.sees_images:
            parts[: len(group.images)] = [answerer.encode(images) for images in group.images]
        visual = join(parts)
        for start in range(0, len(group.asked), sizes.questions):
            indices = group.asked[start : start + sizes.questions]
            # A batch that is not full repeats its last question.
            places = np.minimum(start + np.arange(sizes.questions), len(group.asked) - 1)
            rows = group.asked[places]
            replies = answerer.answer(
                look_up(visual, group.slot[places]), prompts.tokens[rows], prompts.text_valid[rows]
            )
            pending.append((indices, replies))
            if len(pending) > 1:
                settle(*pending.popleft())
    while pending:
        settle(*pending.popleft())
    seconds = (time.perf_counter() - begin) / len(questions)
    return [answers[index] for index in range(len(questions))], seconds


def prefetch(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """The same items, made ahead of time in one thread."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, iterator, end))
            yield item


def image_loader(
    sources: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    decode_image: Callable[..., np.ndarray],
    image_size: int,
) -> Callable[[Question], np.ndarray]:
    """What `make_groups` calls: a question's image out of its source, uint8[H, W, 3]."""

    def load(question: Question) -> np.ndarray:
        encoded = sources[question.task.source][question.record]["image"]
        return decode_image(encoded, size=image_size)

    return load


def _batches(images: Sequence[np.ndarray], *, size: int) -> list[np.ndarray]:
    batches = []
    for start in range(0, len(images), size):
        batch = np.stack(images[start : start + size])
        batches.append(np.pad(batch, ((0, size - len(batch)), (0, 0), (0, 0), (0, 0))))
    return batches
