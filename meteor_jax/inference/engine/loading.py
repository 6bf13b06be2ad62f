"""Images of a group, read and decoded by the host while the device works."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from meteor_jax.inference.engine.batching import ImageGroup
from meteor_jax.inference.engine.data_shards import DataShards
from meteor_jax.inference.engine.images import read_pixels
from meteor_jax.inference.engine.request import Timings

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LoadedGroup:
    """A group's images, as the host prepares them.

    Attributes:
        batches: by local shard, uint8[I, H, W, 3], padded by zeros.
        readable: by local shard, bool[G].
    """

    batches: list[dict[int, np.ndarray]]
    readable: dict[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class GroupLoader:
    """Loads the images of the shards that this process feeds.

    Attributes:
        capacity, encode_batch: of the schedule.
        pool: where images are decoded.
        timings: its `data` is added to.
    """

    shards: DataShards
    capacity: int
    encode_batch: int
    image_size: int
    pool: ThreadPoolExecutor
    timings: Timings

    def __call__(self, group: ImageGroup) -> LoadedGroup:
        with self.timings.measure("data"):
            return self._load(group)

    def _load(self, group: ImageGroup) -> LoadedGroup:
        count, side, local = group.num_encode_batches, self.image_size, self.shards.local
        shape = (count, self.encode_batch, side, side, 3)
        pixels = {shard: np.zeros(shape, np.uint8) for shard in local}
        readable = {shard: np.ones(self.capacity, bool) for shard in local}
        read = functools.partial(read_pixels, size=side)
        for shard in local:
            images = pixels[shard].reshape(-1, side, side, 3)
            for place, image in enumerate(self.pool.map(read, group.images[shard])):
                readable[shard][place] = image is not None
                if image is not None:
                    images[place] = image
        batches = [{shard: pixels[shard][i] for shard in local} for i in range(count)]
        return LoadedGroup(batches, readable)


def prefetch(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """The same items, made ahead of time in one thread."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead: deque[Any] = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, iterator, end))
            yield item
