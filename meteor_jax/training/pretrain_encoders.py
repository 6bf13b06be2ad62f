"""Teaches small encoders to see, one after the other, before a language model listens to them.

The encoders of a released model come trained on many millions of images. Those of the study start
from nothing, and predicting captions teaches them to read far too slowly. Here each learns, with a
linear head over its tokens, what lies in every 4 × 4 pixels of pictures of the reading set: which
digit, letter, shape or bar, and in which colour. The head is thrown away. WORKDIR/ENCODER then
holds a checkpoint of that encoder alone, to be named in `init_from`. An encoder that has one is not
trained again.

I images, N tokens, E encoder width, C cells along a side, K cells along a token's side, P classes
and colours.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import UInt8
from rich.progress import TextColumn

from meteor_jax.checkpoint import CheckpointError, find_step, open_checkpoints, write_config
from meteor_jax.config import ConfigError
from meteor_jax.data.sources import reading
from meteor_jax.data.sources.reading_cells import (
    CLASSES,
    COLOR_CLASSES,
    GROUPS,
    NOTHING,
    label_cells,
)
from meteor_jax.experiment.config import Experiment
from meteor_jax.models.family import build_model
from meteor_jax.progress import progress_bar, track
from meteor_jax.training.logging.metrics import MetricsLog
from meteor_jax.types import Array

CELL = 4  # pixels; half a letter's width
WEIGHT_OF_NOTHING = 0.1  # in the loss: most cells are empty
NUM_TEST = 256  # pictures of the test split
LOG_EVERY = 50
NUM_OUTPUTS = len(CLASSES) + len(COLOR_CLASSES)  # of a cell


class Scenes(flax.struct.PyTreeNode):
    """Pictures and, of each cell, its class and colour."""

    images: UInt8[Any, "I H W 3"]
    classes: UInt8[Any, "I C C"]
    colors: UInt8[Any, "I C C"]

    def rows(self, index: Any) -> Scenes:
        return Scenes(self.images[index], self.classes[index], self.colors[index])


def make_scenes(*, split: str, count: int, side: int, dense_pages: bool) -> Scenes:
    """The first pictures of a split, in memory; with `dense_pages` every other one is full of
    glyphs."""
    classes = np.empty((count, side // CELL, side // CELL), np.uint8)
    colors = np.empty_like(classes)
    images = np.empty((count, side, side, 3), np.uint8)
    for index in track(range(count), f"Drawing {split}"):
        page = dense_pages and index // len(reading.SCENES) % 2
        make = reading.make_page if page else reading.make_picture
        picture = make(index, split=split, side=side)
        images[index] = picture.image
        classes[index], colors[index] = label_cells(picture.elements, side=side, cell=CELL)
    return Scenes(images, classes, colors)


class Params(flax.struct.PyTreeNode):
    """An encoder's parameters, and those of its head: float[E, K · K · P] and float[K · K · P]."""

    encoder: Any
    head: Array
    bias: Array


def train_encoder(
    model: Any,
    encoder: str,
    *,
    scenes: Scenes,
    test: Scenes,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    log: MetricsLog,
) -> tuple[dict[str, Any], dict[str, float]]:
    """The encoder's trained parameters, and the share of `test`'s cells it gets right, by group.

    Raises:
        ConfigError: if the encoder's grid does not divide the cells.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 50 + 1, steps + 1),
            b2=0.95,
            weight_decay=0.01,
        ),
    )
    measure = functools.partial(loss_and_accuracy, model=model, encoder=encoder)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Scenes) -> tuple[Any, Any, Array, Array]:
        (loss, (hits, _)), grads = jax.value_and_grad(measure, has_aux=True)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        filled = batch.classes != NOTHING
        accuracy = jnp.sum(hits & filled) / jnp.sum(filled)
        return optax.apply_updates(params, updates), state, loss, accuracy

    params: Any = init_params(model, encoder, scenes=scenes, seed=seed)
    state, started = optimizer.init(params), time.perf_counter()
    batches = _shuffled(scenes, batch_size=batch_size, seed=seed)
    with progress_bar(TextColumn("{task.fields[numbers]}")) as bar:
        task = bar.add_task(encoder, total=steps, numbers="")
        for number, batch in enumerate(itertools.islice(batches, steps), start=1):
            params, state, loss, accuracy = step(params, state, batch)
            if number % LOG_EVERY == 0 or number == steps:
                row = {"step": number - 1, "loss": float(loss), "accuracy": float(accuracy)}
                log.write_steps([row | {"seconds": time.perf_counter() - started}])
                numbers = f"loss {row['loss']:.3f}, right {row['accuracy']:.1%}"
                bar.update(task, completed=number, numbers=numbers)

    find_hits = jax.jit(lambda *args: measure(*args)[1])
    parts = np.array_split(np.arange(len(test.images)), max(len(test.images) // batch_size, 1))
    found = [find_hits(params, test.rows(part)) for part in parts]
    hits, color_hits = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return params.encoder, {
        group: float(hits[np.isin(test.classes, numbers)].mean())
        for group, numbers in GROUPS.items()
    } | {"colours": float(color_hits[test.colors != NOTHING].mean())}


def init_params(model: Any, encoder: str, *, scenes: Scenes, seed: int) -> Params:
    """Fresh parameters.

    Raises:
        ConfigError: if the encoder's grid does not divide the cells.
    """
    cells, grid = scenes.classes.shape[1], model.config.encoder(encoder).grid
    if cells % grid:
        raise ConfigError(
            f"{encoder}: its {grid} × {grid} tokens do not divide {cells} × {cells} cells of "
            f"{CELL} pixels; choose image and patch sizes that do."
        )
    init = functools.partial(model.init_with_output, encoder=encoder, method="encoder_output")
    key, head_key = jax.random.split(jax.random.PRNGKey(seed))
    tokens, variables = jax.jit(init)(key, scenes.images[:1])
    width, outputs = tokens.shape[-1], (cells // grid) ** 2 * NUM_OUTPUTS
    return Params(
        encoder=variables["params"],
        head=jax.random.normal(head_key, (width, outputs)) * width**-0.5,
        bias=jnp.zeros(outputs),
    )


def loss_and_accuracy(
    params: Params, batch: Scenes, *, model: Any, encoder: str
) -> tuple[Array, tuple[Array, Array]]:
    """The weighted cross-entropy of a batch's cells, their classes' plus their colours', and
    which of both are right: bool[I, C, C]."""
    tokens = model.apply(
        {"params": params.encoder}, batch.images, encoder=encoder, method="encoder_output"
    )
    tokens *= jax.lax.rsqrt(jnp.mean(tokens**2, axis=-1, keepdims=True) + 1e-6)
    # Every token speaks for its own K × K cells.
    cells, grid = batch.classes.shape[1], model.config.encoder(encoder).grid
    side = cells // grid
    logits = tokens @ params.head + params.bias
    logits = logits.reshape(-1, grid, grid, side, side, NUM_OUTPUTS)
    logits = logits.swapaxes(2, 3).reshape(-1, cells, cells, NUM_OUTPUTS)

    weight = jnp.where(batch.classes != NOTHING, 1.0, WEIGHT_OF_NOTHING)
    loss, hits = jnp.float32(0), []
    parts = jnp.split(logits, [len(CLASSES)], axis=-1)
    for part, labels in zip(parts, (batch.classes, batch.colors), strict=True):
        labels = labels.astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(part, labels)
        loss += jnp.sum(losses * weight) / jnp.sum(weight)
        hits.append(part.argmax(-1) == labels)
    return loss, (hits[0], hits[1])


def _shuffled(scenes: Scenes, *, batch_size: int, seed: int) -> Iterator[Scenes]:
    """Endless batches, every epoch in another order."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(scenes.images))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield scenes.rows(order[start : start + batch_size])


def pretrain(
    experiment: Experiment,
    *,
    workdir: Path,
    config: dict[str, Any],
    steps: int,
    batch_size: int,
    learning_rate: float,
    num_images: int,
) -> None:
    """Trains every encoder of the model that `workdir` does not hold yet.

    Raises:
        ValueError: pictures of a size that the reading set has not, or too few of them.
    """
    family = build_model(experiment.model)
    model = family.module
    side = experiment.model.image_size
    if num_images < batch_size:
        raise ConfigError(f"num_images={num_images} do not fill one batch of {batch_size}.")
    reading.check_side(side)
    if side % CELL:
        raise ConfigError(f"model.image_size={side}: expected a multiple of {CELL} pixels.")
    missing = {}
    for name in family.encoders:
        if _is_finished(workdir / name):
            print(f"{name} is there already: {workdir / name}")
        else:
            missing[name] = workdir / name
    if not missing:
        return
    scenes = make_scenes(split="train", count=num_images, side=side, dense_pages=True)
    test = make_scenes(split="test", count=NUM_TEST, side=side, dense_pages=False)
    for name, folder in missing.items():
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config)
        with MetricsLog(folder, first_step=0) as log:
            params, accuracy = train_encoder(
                model,
                name,
                scenes=scenes,
                test=test,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                seed=experiment.seed,
                log=log,
            )
        shown = ", ".join(f"{group} {share:.1%}" for group, share in accuracy.items())
        print(f"{name} sees in pictures of the test split: {shown}")
        with open_checkpoints(folder) as checkpoints:
            checkpoints.save(
                steps,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params), config=ocp.args.JsonSave(config)
                ),
            )
            checkpoints.wait_until_finished()


def _is_finished(folder: Path) -> bool:
    try:
        find_step(folder)
    except CheckpointError:
        return False
    return True
