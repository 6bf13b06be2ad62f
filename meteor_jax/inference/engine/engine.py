"""The engine: requests in, predictions out.

Prompts are batched by static shapes, an image is encoded once for all prompts about it, and rows
are split over the mesh. The host decodes the next images while the device works, and outputs are
fetched one batch late, so that neither waits for the other.

S shards of the mesh, I images of a shard in one batch, G images of a shard in a group, b prompts
of a shard, B = S·b prompts, M images of a prompt.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.config import ConfigError, suggest
from meteor_jax.data.sources.registry import CorruptImage
from meteor_jax.data.templates import Template
from meteor_jax.data.tokenizers import Tokenizer
from meteor_jax.inference.engine.batching import (
    NO_IMAGE,
    BatchSizes,
    Schedule,
    ScheduledBatch,
    make_schedule,
)
from meteor_jax.inference.engine.data_shards import DataShards, split_by_rows
from meteor_jax.inference.engine.loading import GroupLoader, prefetch
from meteor_jax.inference.engine.predictor import Predictor, PromptBatch
from meteor_jax.inference.engine.prompts import PromptLimits, make_prompt
from meteor_jax.inference.engine.request import (
    Prediction,
    Prompt,
    Request,
    ShapeBucket,
    Timings,
)
from meteor_jax.inference.engine.streaming import text_pieces
from meteor_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model under one or several plans, on the devices of a mesh.

    `inference.load.load_engine` makes one from the folder of a run:

    >>> from meteor_jax import Request, load_engine
    >>> engine = load_engine("runs/tiny", plans="full,meteor")
    >>> requests = [
    ...     Request("what shape is it?", images=["photo.png"], plan=plan, max_new_tokens=8)
    ...     for plan in ("full", "meteor")
    ... ]
    >>> for prediction in engine.predict(requests):
    ...     print(requests[prediction.index].plan, prediction.text, prediction.kept)
    >>> for piece in engine.stream(requests[0]):
    ...     print(piece, end="", flush=True)

    Attributes:
        predictors: by the name of its plan, what encodes images and answers prompts.
        template: what questions are written in.
        limits: lengths that prompts are padded to, and positions that they may take.
        sizes: of batches, over all shards.
    """

    predictors: Mapping[str, Predictor]
    tokenizer: Tokenizer
    template: Template
    limits: PromptLimits
    sizes: BatchSizes
    shards: DataShards = DataShards()

    @property
    def image_size(self) -> int:
        """Pixels of an image's side, as the model takes it."""
        return next(iter(self.predictors.values())).image_size

    def prepare(self, request: Request) -> Prompt:
        """The prompt of a request, which `predict` takes in its place.

        Raises:
            ConfigError: if its text is too long, or the engine has no such plan.
        """
        plan = request.plan or next(iter(self.predictors))
        if plan not in self.predictors:
            near = suggest(plan, self.predictors)
            raise ConfigError(f"request: the engine has no plan '{plan}'.{near}")
        return make_prompt(
            request,
            plan=plan,
            template=self.template,
            tokenizer=self.tokenizer,
            limits=self.limits,
        )

    def predict(
        self,
        requests: Sequence[Request | Prompt],
        *,
        timings: Timings | None = None,
        warm_up: bool = False,
    ) -> Iterator[Prediction]:
        """Answers every request once. Predictions come batch by batch, as they are ready.

        What the caller does between them is host time, while the device works on.

        Args:
            timings: is added to.
            warm_up: runs each shape of batch once beforehand, so that compiling is counted apart.

        Raises:
            ConfigError: as `prepare`, before anything is run.
        """
        prompts = [
            request if isinstance(request, Prompt) else self.prepare(request)
            for request in requests
        ]
        # Prompts without images go by themselves: under some plans their programs are smaller.
        parts: dict[tuple[str, bool], list[int]] = {}
        for index, prompt in enumerate(prompts):
            parts.setdefault((prompt.plan, bool(prompt.images)), []).append(index)
        for (plan, has_images), indices in parts.items():
            run = _Run(
                self.predictors[plan],
                [prompts[index] for index in indices],
                sizes=self.sizes,
                shards=self.shards,
                has_images=has_images,
                timings=Timings() if timings is None else timings,
            )
            for prediction in run.predict(warm_up=warm_up):
                yield dataclasses.replace(prediction, index=indices[prediction.index])

    def stream(self, request: Request | Prompt) -> Iterator[str]:
        """The answer in pieces, as its tokens come; joined they are the text of `predict`.

        Raises:
            ConfigError: as `prepare`.
        """
        prompt = request if isinstance(request, Prompt) else self.prepare(request)
        count = self.shards.count  # one row a shard; the others repeat the prompt
        run = _Run(
            self.predictors[prompt.plan],
            [prompt],
            sizes=BatchSizes(encode=count, batch=count, cache=count),
            shards=self.shards,
            has_images=bool(prompt.images),
            timings=Timings(),
        )
        return text_pieces(run.stream(), stop=prompt.bucket.stop)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Prompts of one plan, from the first image to the last prediction."""

    predictor: Predictor
    prompts: Sequence[Prompt]
    sizes: BatchSizes
    shards: DataShards
    has_images: bool
    timings: Timings

    def predict(self, *, warm_up: bool) -> Iterator[Prediction]:
        schedule, timings = self._schedule(), self.timings
        with timings.measure("compile"):
            blanks = self._blanks(schedule)
            if warm_up:
                visual = self._visual([], blanks)
                for batch in schedule.buckets.values():
                    rows = self._lay_out(batch)
                    jax.block_until_ready(self._call(self.predictor.warm_up, batch, visual, rows))
        last = time.perf_counter()
        pending: deque[tuple[ScheduledBatch, Any, Array]] = deque()

        def lap() -> float:
            nonlocal last
            before, last = last, time.perf_counter()
            timings.wall += last - before
            return last - before

        def fetch() -> list[Prediction]:
            batch, outputs, readable = pending.popleft()
            with timings.measure("model"):
                outputs, readable = jax.device_get((outputs, readable))
            return self._read(batch, outputs, readable, seconds=lap())

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            load = self._loader(schedule, pool)
            for group, loaded in zip(
                schedule.groups, prefetch(map(load, schedule.groups)), strict=True
            ):
                images = [self.shards.place(batch) for batch in loaded.batches]
                readable = self.shards.everywhere(self.shards.place(loaded.readable))
                with timings.measure("model"):
                    visual = self._visual(images, blanks)
                for batch in group.batches:
                    rows = self._lay_out(batch)
                    with timings.measure("model"):
                        outputs = self._call(self.predictor.predict, batch, visual, rows)
                    pending.append((batch, self.shards.everywhere(outputs), readable))
                    if len(pending) > 1:
                        yield from fetch()
            while pending:
                yield from fetch()
        lap()

    def stream(self) -> Iterator[str]:
        """The text of the one prompt after each token."""
        schedule = self._schedule()
        (group,) = schedule.groups
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            loaded = self._loader(schedule, pool)(group)
        if not self.shards.fetch(self.shards.place(loaded.readable)).all():
            raise CorruptImage("request: an image cannot be decoded; check the file.")
        images = [self.shards.place(batch) for batch in loaded.batches]
        visual, (batch,) = self._visual(images, self._blanks(schedule)), group.batches
        texts = self._call(self.predictor.stream, batch, visual, self._lay_out(batch))
        while True:  # the mesh is in force only while a token is made
            with self.shards.active():
                text = next(texts, None)
            if text is None:
                return
            yield text

    def _schedule(self) -> Schedule:
        return make_schedule(self.prompts, sizes=self.sizes, shards=self.shards.count)

    def _loader(self, schedule: Schedule, pool: ThreadPoolExecutor) -> GroupLoader:
        return GroupLoader(
            shards=self.shards,
            capacity=schedule.capacity,
            encode_batch=schedule.encode_batch,
            image_size=self.predictor.image_size,
            pool=pool,
            timings=self.timings,
        )

    def _blanks(self, schedule: Schedule) -> list[Any]:
        """Visual features of no images, for every place of a group."""
        side = self.predictor.image_size
        zeros = np.zeros((schedule.encode_batch, side, side, 3), np.uint8)
        blank = self._encode(self.shards.place(dict.fromkeys(self.shards.local, zeros)))
        return [blank] * (schedule.capacity // schedule.encode_batch)

    def _encode(self, images: Array) -> Any:
        encode = self.predictor.encode if self.has_images else self.predictor.encode_nothing
        with self.shards.active():
            return encode(images)

    def _visual(self, images: list[Array], blanks: list[Any]) -> Any:
        """A group's visual features: of its batches of images, and of none for what is left."""
        parts = [self._encode(batch) for batch in images]
        with self.shards.active():
            return join(parts + blanks[len(parts) :])

    def _lay_out(self, batch: ScheduledBatch) -> tuple[Array, PromptBatch]:
        """A batch's image indices and prompts, [S, b, ...] on their shards."""
        rows = pad_prompts(self.prompts, batch.prompts, bucket=batch.bucket)
        return jax.tree.map(
            lambda leaf: self.shards.place({shard: leaf[shard] for shard in self.shards.local}),
            (batch.image_index, rows),
        )

    def _call(
        self,
        method: Callable[..., Any],
        batch: ScheduledBatch,
        visual: Any,
        rows: tuple[Array, PromptBatch],
    ) -> Any:
        with self.shards.active():
            visual, prompts = look_up(visual, *rows)
            return method(visual, prompts, bucket=batch.bucket)

    def _read(
        self, batch: ScheduledBatch, outputs: Any, readable: np.ndarray, *, seconds: float
    ) -> list[Prediction]:
        """The rows of a batch that do not only fill it up."""
        shard = np.arange(len(batch.real))[:, None, None]
        found = (readable[shard, batch.image_index] | (batch.image_index == NO_IMAGE)).all(-1)
        rows = np.flatnonzero(batch.real)
        predictions = []
        for row, index in zip(rows.tolist(), batch.prompts[batch.real].tolist(), strict=True):
            prompt = self.prompts[index]
            predictions.append(
                Prediction(
                    index=index,
                    unreadable=not found.flat[row],
                    prompt_tokens=len(prompt.tokens),
                    prompt_length=prompt.bucket.prompt_length,
                    num_images=len(prompt.images),
                    batch_rows=batch.real.shape[1],
                    seconds=seconds / len(rows),
                    **self.predictor.read(outputs, row, bucket=batch.bucket),
                )
            )
        return predictions


@jax.jit
def join(parts: Sequence[Any]) -> Any:
    """[S, G, ...] of batches of [S, I, ...]."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)


@jax.jit
def look_up(visual: Any, image_index: Array, rows: PromptBatch) -> tuple[Any, PromptBatch]:
    """[B, M, ...], every prompt's images out of its own shard of [S, G, ...], and `rows` as B.

    Shapes:
        image_index: int32[S, b, M].
    """

    def flat(leaf: Array) -> Array:
        return split_by_rows(leaf.reshape(-1, *leaf.shape[2:]))

    found = jax.tree.map(
        lambda leaf: flat(jax.vmap(lambda images, places: images[places])(leaf, image_index)),
        visual,
    )
    return found, jax.tree.map(flat, rows)


def pad_prompts(
    prompts: Sequence[Prompt], index: np.ndarray, *, bucket: ShapeBucket
) -> PromptBatch:
    """The prompts at `index`, int[...], as arrays of the given shape."""
    tokens = np.zeros((*index.shape, bucket.prompt_length), np.int32)
    text_valid = np.zeros(tokens.shape, bool)
    image_valid = np.zeros((*index.shape, bucket.num_images), bool)
    seeds = np.zeros(index.shape, np.uint32)
    for place in np.ndindex(index.shape):
        prompt = prompts[index[place]]
        tokens[place][: len(prompt.tokens)] = prompt.tokens
        text_valid[place][: len(prompt.tokens)] = True
        image_valid[place][: len(prompt.images)] = True
        seeds[place] = prompt.seed % 2**32
    return PromptBatch(tokens, text_valid, image_valid, seeds)
