"""Which prompts are asked together: a few static shapes, each image encoded once.

Everything here depends on the prompts alone, so all hosts make the same schedule.

S shards of the mesh, b prompts of a shard in one batch, M images of a prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np

from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.inference.engine.images import ImageHandle
from meteor_jax.inference.engine.request import Prompt, ShapeBucket

NO_IMAGE = -1
WINDOW = 8  # groups within which images may change places, so that like prompts come together


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Static sizes over all shards.

    Attributes:
        encode: images encoded together. batch: prompts asked together.
        cache: images whose visual tokens are on the devices at once.
    """

    encode: int
    batch: int
    cache: int

    @classmethod
    def of(cls, config: EvalConfig, *, shards: int) -> BatchSizes:
        """Those of `config.eval`, rounded up to as many for each of so many shards."""
        encode, batch = (
            math.ceil(size / shards) * shards
            for size in (config.encode_batch_size, config.batch_size)
        )
        return cls(encode=encode, batch=batch, cache=config.visual_cache_images)


@dataclasses.dataclass(frozen=True)
class ScheduledBatch:
    """One batch of prompts.

    Shapes:
        prompts: int64[S, b] into the prompts.
        real: bool[S, b]; False where a row only fills up the batch.
        image_index: int32[S, b, M]; a prompt's images among those of its shard, then `NO_IMAGE`.
    """

    bucket: ShapeBucket
    prompts: np.ndarray
    real: np.ndarray
    image_index: np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageGroup:
    """Some images and all prompts about them.

    Attributes:
        images: of every shard.
        num_encode_batches: no shard has more.
    """

    images: tuple[tuple[ImageHandle, ...], ...]
    num_encode_batches: int
    batches: tuple[ScheduledBatch, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Everything that is asked, in order.

    Attributes:
        encode_batch: images of a shard that are encoded together.
        capacity: images of a shard that are on its devices at once.
    """

    groups: tuple[ImageGroup, ...]
    encode_batch: int
    capacity: int

    @property
    def buckets(self) -> dict[ShapeBucket, ScheduledBatch]:
        """A batch of every shape."""
        return {batch.bucket: batch for group in self.groups for batch in group.batches}


@dataclasses.dataclass
class _Shard:
    """A shard's part of the group that is being filled."""

    images: list[ImageHandle] = dataclasses.field(default_factory=list)
    prompts: list[int] = dataclasses.field(default_factory=list)
    taken: int = 0


def make_schedule(prompts: Sequence[Prompt], *, sizes: BatchSizes, shards: int = 1) -> Schedule:
    """All of `prompts`, each once.

    Images stay near the order in which `prompts` name them, which is that of their files.
    """
    of_images: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        of_images.setdefault(prompt.images or index, []).append(index)
    most = max((prompt.bucket.num_images for prompt in prompts), default=1)
    encode_batch = sizes.encode // shards
    capacity = -(-max(sizes.cache // shards, most) // encode_batch) * encode_batch

    sets, span = list(of_images.values()), WINDOW * sizes.cache
    filling, groups = [_Shard() for _ in range(shards)], []

    def close() -> None:
        longest = max(len(shard.images) for shard in filling)
        batches = _make_batches(filling, prompts, rows=sizes.batch // shards)
        images = tuple(tuple(shard.images) for shard in filling)
        groups.append(ImageGroup(images, -(-longest // encode_batch), batches))

    for start in range(0, len(sets), span):
        near = sorted(
            sets[start : start + span], key=lambda rows: max(prompts[i].bucket for i in rows)
        )
        for rows in near:
            images = prompts[rows[0]].images
            taken = max(len(images), 1)  # a prompt without images counts too, or none would close
            free = [shard for shard in filling if shard.taken + taken <= capacity]
            if not free:
                close()
                free = filling = [_Shard() for _ in range(shards)]
            shard = min(free, key=lambda shard: len(shard.prompts))
            shard.images += images
            shard.prompts += rows
            shard.taken += taken
    if sets:
        close()
    return Schedule(tuple(groups), encode_batch=encode_batch, capacity=capacity)


def _make_batches(
    shards: Sequence[_Shard], prompts: Sequence[Prompt], *, rows: int
) -> tuple[ScheduledBatch, ...]:
    """The prompts of each shard by shape, in batches that every shard takes part in."""
    batches = []
    places = [{image: place for place, image in enumerate(shard.images)} for shard in shards]
    for bucket in sorted({prompts[i].bucket for shard in shards for i in shard.prompts}):
        of_bucket = [[i for i in shard.prompts if prompts[i].bucket == bucket] for shard in shards]
        for start in range(0, max(map(len, of_bucket)), rows):
            first = next(indices[start] for indices in of_bucket if len(indices) > start)
            index = np.full((len(shards), rows), first)
            image_index = np.full((len(shards), rows, bucket.num_images), NO_IMAGE, np.int32)
            real = np.zeros((len(shards), rows), bool)
            for shard, indices in enumerate(of_bucket):
                part = indices[start : start + rows]
                real[shard, : len(part)] = True
                # Its own last prompt fills a shard up, as that ends when it ends anyway.
                for row, prompt in enumerate(part + part[-1:] * (rows - len(part))):
                    index[shard, row] = prompt
                    found = [places[shard][image] for image in prompts[prompt].images]
                    image_index[shard, row, : len(found)] = found
            batches.append(ScheduledBatch(bucket, index, real, image_index))
    return tuple(batches)
