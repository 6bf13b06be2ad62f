"""Which prompts are asked together: a few static shapes, each image encoded once.

Everything here depends on the prompts alone, so all hosts make the same schedule.

S lanes, b prompts of a lane in one batch, T prompt tokens, M images of a prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np

from meteor_jax.experiment.eval_config import EvalConfig

NO_IMAGE = -1
WINDOW = 8  # groups within which images may change places, so that like prompts come together


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """What one program is compiled for: T, M and the length of an answer."""

    prompt_length: int
    num_images: int
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Ask:
    """One prompt.

    Attributes:
        tokens: its ids, with `IMAGE_TOKEN` for each of `images`.
        images: keys; equal keys are one image.
        shape: that it is asked in. It depends on nothing but the prompt, whatever is asked beside.
    """

    tokens: tuple[int, ...]
    images: tuple[Hashable, ...]
    shape: Shape


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Static sizes over all lanes: images encoded together, prompts asked together, and images
    whose visual tokens lie on the devices at once."""

    images: int
    questions: int
    group: int

    @classmethod
    def of(cls, config: EvalConfig, *, lanes: int) -> BatchSizes:
        """Those of `config.eval`, rounded up to as many for each of so many lanes."""
        images, questions = (
            math.ceil(size / lanes) * lanes
            for size in (config.encode_batch_size, config.batch_size)
        )
        return cls(images=images, questions=questions, group=config.visual_cache_images)


@dataclasses.dataclass(frozen=True)
class Step:
    """One batch of prompts.

    Shapes:
        asked: int64[S, b] into the prompts.
        counts: bool[S, b]; False where a row only fills up the batch.
        slot: int32[S, b, M]; places of a prompt's images among those of its lane, then `NO_IMAGE`.
    """

    shape: Shape
    asked: np.ndarray
    counts: np.ndarray
    slot: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
    """Some images and all prompts about them.

    Attributes:
        images: of every lane, the keys of its images.
        num_batches: of images to encode; no lane has more.
    """

    images: tuple[tuple[Hashable, ...], ...]
    num_batches: int
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Everything that is asked, in order.

    Attributes:
        slots: images of a lane that lie on its devices at once.
    """

    groups: tuple[Group, ...]
    sizes: BatchSizes
    lanes: int
    slots: int


def make_schedule(asks: Sequence[Ask], *, sizes: BatchSizes, lanes: int = 1) -> Schedule:
    """All of `asks`, each once.

    Images stay near the order in which `asks` name them, which is that of their files.
    """
    of_images: dict[Hashable, list[int]] = {}
    for index, ask in enumerate(asks):
        of_images.setdefault(ask.images or index, []).append(index)
    most = max((ask.shape.num_images for ask in asks), default=1)
    per_batch = sizes.images // lanes
    slots = -(-max(sizes.group // lanes, most) // per_batch) * per_batch

    sets, span = list(of_images.values()), WINDOW * sizes.group
    open_lanes, groups = [_Lane() for _ in range(lanes)], []

    def close() -> None:
        longest = max(len(lane.images) for lane in open_lanes)
        steps = _steps(open_lanes, asks, rows=sizes.questions // lanes)
        images = tuple(tuple(lane.images) for lane in open_lanes)
        groups.append(Group(images, num_batches=-(-longest // per_batch), steps=steps))

    for start in range(0, len(sets), span):
        near = sorted(sets[start : start + span], key=lambda rows: max(asks[i].shape for i in rows))
        for rows in near:
            images = asks[rows[0]].images
            taken = max(len(images), 1)  # a prompt without images counts too, or none would close
            free = [lane for lane in open_lanes if lane.taken + taken <= slots]
            if not free:
                close()
                free = open_lanes = [_Lane() for _ in range(lanes)]
            lane = min(free, key=lambda lane: len(lane.asked))
            lane.images += images
            lane.asked += rows
            lane.taken += taken
    if sets:
        close()
    return Schedule(tuple(groups), sizes=sizes, lanes=lanes, slots=slots)


@dataclasses.dataclass
class _Lane:
    """A lane of the group that is being filled."""

    images: list[Hashable] = dataclasses.field(default_factory=list)
    asked: list[int] = dataclasses.field(default_factory=list)
    taken: int = 0


def _steps(lanes: Sequence[_Lane], asks: Sequence[Ask], *, rows: int) -> tuple[Step, ...]:
    """The prompts of each lane by shape, in batches that every lane takes part in."""
    steps = []
    places = [{key: place for place, key in enumerate(lane.images)} for lane in lanes]
    for shape in sorted({asks[i].shape for lane in lanes for i in lane.asked}):
        of_shape = [[i for i in lane.asked if asks[i].shape == shape] for lane in lanes]
        for start in range(0, max(map(len, of_shape)), rows):
            first = next(indices[start] for indices in of_shape if len(indices) > start)
            asked = np.full((len(lanes), rows), first)
            slot = np.full((len(lanes), rows, shape.num_images), NO_IMAGE, np.int32)
            counts = np.zeros((len(lanes), rows), bool)
            for lane, indices in enumerate(of_shape):
                part = indices[start : start + rows]
                counts[lane, : len(part)] = True
                # Its own last prompt fills a lane up, as that ends when it ends anyway.
                for row, index in enumerate(part + part[-1:] * (rows - len(part))):
                    asked[lane, row] = index
                    found = [places[lane][key] for key in asks[index].images]
                    slot[lane, row, : len(found)] = found
            steps.append(Step(shape, asked, counts, slot))
    return tuple(steps)
