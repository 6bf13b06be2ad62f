"""What an engine is asked, and what it gives back."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator, Hashable, Sequence
from typing import Any

from meteor_jax.inference.engine.images import ImageHandle, image_handle
from meteor_jax.inference.sampling import GREEDY, Sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """A question about some images.

    Attributes:
        question: its text. An `<image>` in it is the place of an image; images without one come
            first.
        images: encoded bytes, paths, PIL images, uint8[H, W, 3] arrays, or `ImageHandle`s, which
            are read when they are needed. Images of equal keys are encoded once.
        plan: one of the engine's plans by name; "" takes its first.
        max_new_tokens: the answer is cut off there.
        stop: a text or several; the answer ends before the first that comes.
        history: earlier turns of the conversation, as (question, answer).
        sampling: how tokens are drawn; the most likely ones by default.
        seed: of that. A request and a seed have the same answer, whatever is asked beside.
    """

    question: str
    images: Sequence[Any] = ()
    plan: str = ""
    max_new_tokens: int = 64
    stop: str | Sequence[str] = ()
    history: tuple[tuple[str, str], ...] = ()
    sampling: Sampling = GREEDY
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"request: expected max_new_tokens ≥ 1, got {self.max_new_tokens}.")
        object.__setattr__(self, "images", tuple(map(image_handle, self.images)))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(filter(None, stop)))


@dataclasses.dataclass(frozen=True, order=True)
class ShapeBucket:
    """What prompts of one batch have in common: programs are compiled for it.

    Attributes:
        prompt_length: text tokens, with padding. num_images: places for images.
    """

    prompt_length: int
    num_images: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request as the engine asks it.

    Attributes:
        tokens: its ids, with `IMAGE_TOKEN` for each of `images`.
        images: those for which the decoder has positions.
        bucket: depends on nothing but the request, whatever is asked beside.
    """

    tokens: tuple[int, ...]
    images: tuple[ImageHandle, ...]
    bucket: ShapeBucket
    plan: str
    seed: int = 0

    @property
    def image_keys(self) -> tuple[Hashable, ...]:
        return tuple(image.key for image in self.images)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model said to one request.

    Attributes:
        index: of the request among those asked together.
        text: the answer, stripped. tokens: its ids, without the end token.
        scores: by class or candidate, of a model that gives them; () for one that writes text.
        finite: False where a logit was NaN or infinite, so the answer means nothing.
        unreadable: an image could not be decoded, so the answer means nothing.
        kept: visual tokens left after each pruning step in the decoder; () where there was none.
        computed: visual tokens that the layers after each pruning step computed, this request's
            share of its batch's total; never fewer than it kept, on average.
        prompt_tokens: text tokens of the prompt; prompt_length: places that it was padded to.
        num_images: asked about; those for which the decoder has no positions are not.
        batch_rows: prompts of its batch on one shard of the mesh.
        seconds: its share of the wall time of its batch, everything compiled before.
    """

    index: int = dataclasses.field(default=0, compare=False)
    text: str = ""
    tokens: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    finite: bool = True
    unreadable: bool = False
    kept: tuple[int, ...] = ()
    computed: tuple[float, ...] = ()
    prompt_tokens: int = 0
    prompt_length: int = 0
    num_images: int = 1
    batch_rows: int = 1
    seconds: float = 0.0


@dataclasses.dataclass
class Timings:
    """Seconds of an engine's work, added up.

    Attributes:
        compile: before the first batch, once a shape.
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
    def measure(self, name: str) -> Generator[None]:
        """Adds the time inside to the field `name`."""
        begin = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - begin)
