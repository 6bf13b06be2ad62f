"""Asks a model one plan's prompts: images encoded once, every prompt alone.

The host decodes the next images while the device works, and answers are fetched one batch late,
so that neither waits for the other.

S lanes, I images of a lane in one batch, G images of a lane in a group, b prompts of a lane,
B = S·b prompts, M images of a prompt, N visual tokens, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.data.sources.registry import CorruptImage
from meteor_jax.inference.engine.batching import NO_IMAGE, Ask, Group, Schedule, Shape, Step
from meteor_jax.inference.engine.data_shards import Lanes, split_by_rows
from meteor_jax.inference.engine.predictor import Answerer, Replies, Rows
from meteor_jax.types import Array, VisualTokens

T = TypeVar("T")
Read = Callable[[Hashable], Any]
Decode = Callable[[Any], np.ndarray]


@jax.jit
def join(parts: Sequence[VisualTokens]) -> VisualTokens:
    """[S, G, N, D] of batches of [S, I, N, D]."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)


@jax.jit
def look_up(group: VisualTokens, slot: Array, rows: Rows) -> tuple[VisualTokens, Rows]:
    """[B, M, N, D], every prompt's images out of its own lane of [S, G, N, D], and `rows` as B.

    Shapes:
        slot: int32[S, b, M].
    """

    def flat(leaf: Array) -> Array:
        return split_by_rows(leaf.reshape(-1, *leaf.shape[2:]))

    visual = jax.tree.map(
        lambda leaf: flat(jax.vmap(lambda images, places: images[places])(leaf, slot)), group
    )
    return visual, jax.tree.map(flat, rows)


@dataclasses.dataclass(frozen=True)
class Answered:
    """A batch's answers on the host, without the rows that filled it up; n prompts.

    Shapes:
        index: int64[n] into the prompts.
        tokens: int32[n, max_new_tokens]; num_tokens: int32[n].
        finite: bool[n]; kept: int32[n] and computed: float32[n] a cut in the LLM; see `Replies`.
        unreadable: bool[n]; an image could not be decoded, so the answer means nothing.
    """

    index: np.ndarray
    tokens: np.ndarray
    num_tokens: np.ndarray
    finite: np.ndarray
    kept: tuple[np.ndarray, ...]
    computed: tuple[np.ndarray, ...]
    unreadable: np.ndarray


@dataclasses.dataclass
class Timings:
    """Where the time went, added up while prompts are asked.

    Attributes:
        compile: before the first prompt, once a shape.
        wall: from then on. model: of that, calling the model and waiting for its answers.
        data: reading and decoding images, in a thread beside the model.
    """

    compile: float = 0.0
    wall: float = 0.0
    model: float = 0.0
    data: float = 0.0

    @property
    def host(self) -> float:
        """Seconds in which the model was not called or waited for."""
        return self.wall - self.model

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self) | {"host": self.host}

    @contextlib.contextmanager
    def adding(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - begin)


def answer_prompts(
    asks: Sequence[Ask],
    answerer: Answerer,
    *,
    schedule: Schedule,
    read_image: Read,
    decode_image: Decode,
    image_size: int,
    seconds: Timings,
    lanes: Lanes,
    warm_up: bool = True,
) -> Iterator[Answered]:
    """Asks everything in the schedule, batch by batch; what the caller does meanwhile is host time.

    Args:
        read_image: what a key stands for; called in one thread.
        decode_image: uint8[H, W, 3] of that, or `CorruptImage`; called in several.
        seconds: is added to.
        warm_up: asks each shape of batch once beforehand, so that compiling is counted apart.
    """
    if not schedule.groups:
        return
    per_batch = schedule.sizes.images // schedule.lanes
    zeros = np.zeros((per_batch, image_size, image_size, 3), np.uint8)
    with seconds.adding("compile"):
        blank = answerer.encode(lanes.place(dict.fromkeys(lanes.local, zeros)))
        blanks = [blank] * (schedule.slots // per_batch)
        warm = join(blanks)
        steps = [step for group in schedule.groups for step in group.steps]
        for step in {step.shape: step for step in steps if warm_up}.values():
            slot, rows = _lay_out(asks, step, lanes=lanes)
            jax.block_until_ready(_ask(answerer.warm_up, step, warm, slot=slot, rows=rows))

    begin = time.perf_counter()
    pending: deque[tuple[Step, Replies, Array]] = deque()

    def settle() -> Answered:
        step, replies, readable = pending.popleft()
        with seconds.adding("model"):
            replies, readable = jax.device_get((replies, readable))
        seconds.wall = before + time.perf_counter() - begin
        return _answered(step, replies, readable)

    before = seconds.wall
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:

        def load(group: Group) -> _Loaded:
            if not answerer.sees_images:
                return _Loaded([], dict.fromkeys(lanes.local, np.ones(schedule.slots, bool)))
            with seconds.adding("data"):
                return _load(
                    group,
                    lanes=lanes,
                    slots=schedule.slots,
                    blank=zeros,
                    read_image=read_image,
                    decode_image=decode_image,
                    pool=pool,
                )

        for group, loaded in zip(
            schedule.groups, prefetch(map(load, schedule.groups)), strict=True
        ):
            batches = [lanes.place(batch) for batch in loaded.batches]
            readable = lanes.everywhere(lanes.place(loaded.readable))
            with seconds.adding("model"):
                parts = [answerer.encode(batch) for batch in batches]
                visual = join(parts + blanks[len(parts) :])
            for step in group.steps:
                slot, rows = _lay_out(asks, step, lanes=lanes)
                with seconds.adding("model"):
                    replies = _ask(answerer.answer, step, visual, slot=slot, rows=rows)
                pending.append((step, lanes.everywhere(replies), readable))
                if len(pending) > 1:
                    yield settle()
        while pending:
            yield settle()
    seconds.wall = before + time.perf_counter() - begin


def _ask(
    answer: Callable[..., Any], step: Step, group: VisualTokens, *, slot: Array, rows: Rows
) -> Any:
    visual, rows = look_up(group, slot, rows)
    return answer(visual, rows, max_new_tokens=step.shape.max_new_tokens)


def _lay_out(asks: Sequence[Ask], step: Step, *, lanes: Lanes) -> tuple[Array, Rows]:
    """A step's slots and prompts, [S, b, ...] on their lanes."""
    rows = pad_prompts(asks, step.asked, shape=step.shape)
    return jax.tree.map(
        lambda leaf: lanes.place({lane: leaf[lane] for lane in lanes.local}), (step.slot, rows)
    )


def pad_prompts(asks: Sequence[Ask], index: np.ndarray, *, shape: Shape) -> Rows:
    """The prompts at `index`, int[...], as arrays of the given shape."""
    tokens = np.zeros((*index.shape, shape.prompt_length), np.int32)
    text_valid = np.zeros(tokens.shape, bool)
    image_valid = np.zeros((*index.shape, shape.num_images), bool)
    for place in np.ndindex(index.shape):
        ask = asks[index[place]]
        tokens[place][: len(ask.tokens)] = ask.tokens
        text_valid[place][: len(ask.tokens)] = True
        image_valid[place][: len(ask.images)] = True
    return Rows(tokens, text_valid, image_valid)


def _answered(step: Step, replies: Replies, readable: np.ndarray) -> Answered:
    counts = step.counts.reshape(-1)
    lane = np.arange(len(step.slot))[:, None, None]
    sound = (readable[lane, step.slot] | (step.slot == NO_IMAGE)).all(-1)
    return Answered(
        index=step.asked[step.counts],
        tokens=replies.tokens[counts],
        num_tokens=replies.num_tokens[counts],
        finite=replies.finite[counts],
        kept=tuple(cut[counts] for cut in replies.kept),
        computed=tuple(cut[counts] for cut in replies.computed),
        unreadable=~sound[step.counts],
    )


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A group's images, as the host prepares them.

    Attributes:
        batches: by local lane, uint8[I, H, W, 3], padded by zeros.
        readable: by local lane, bool[G].
    """

    batches: list[dict[int, np.ndarray]]
    readable: dict[int, np.ndarray]


def _load(
    group: Group,
    *,
    lanes: Lanes,
    slots: int,
    blank: np.ndarray,
    read_image: Read,
    decode_image: Decode,
    pool: ThreadPoolExecutor,
) -> _Loaded:
    def decode(encoded: Any) -> np.ndarray | None:
        with contextlib.suppress(CorruptImage):
            return decode_image(encoded)
        return None

    size = len(blank)
    images = {lane: np.repeat(blank[:1], group.num_batches * size, 0) for lane in lanes.local}
    readable = {lane: np.ones(slots, bool) for lane in lanes.local}
    for lane in lanes.local:
        for place, image in enumerate(pool.map(decode, map(read_image, group.images[lane]))):
            readable[lane][place] = image is not None
            if image is not None:
                images[lane][place] = image
    batches = [
        {lane: images[lane][start : start + size] for lane in lanes.local}
        for start in range(0, group.num_batches * size, size)
    ]
    return _Loaded(batches, readable)


def prefetch(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """The same items, made ahead of time in one thread."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, iterator, end))
            yield item
