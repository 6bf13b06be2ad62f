"""A run so small that it compiles in a second; also a program that a test can kill.

Run as `python -m tests.training.tiny_run WORKDIR [KILL_AT_STEP]`.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.config import build
from meteor_jax.data.pipeline import DataConfig
from meteor_jax.experiment.config import Experiment, TrainConfig
from meteor_jax.models.eagle.config import MeteorConfig, default_encoders
from meteor_jax.models.eagle.family import Eagle
from meteor_jax.models.eagle.outputs import Forward, HiddenStates
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.training.logging.recorder import CLOCK_FIELDS
from meteor_jax.training.loop import train
from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN, Batch, PruneTrace

TEXT_LENGTH, SIDE, VOCABULARY, WIDTH = 8, 4, 16, 8
RANKS = {"clip": (2.0, 2.0, 2.0), "pix2struct": (1.0, 1.0, 1.0)}
PLANS = {"pruned": "meteor(encode=(6, 5, 4), fuse=3)"}


class Encoder(nn.Module):
    """A picture as one vector."""

    width: int

    @nn.compact
    def __call__(self, pixels):
        hidden = nn.Dense(self.width, name="fc1")(pixels)
        return nn.Dense(self.width, name="fc2")(nn.RMSNorm(name="norm")(hidden))


class Decoder(nn.Module):
    """The next token from this one and the picture."""

    width: int

    def setup(self):
        self.embedding = nn.Embed(VOCABULARY, self.width)
        self.head = nn.Dense(VOCABULARY, use_bias=False)

    def __call__(self, tokens, picture):
        return jnp.tanh(self.embedding(jnp.maximum(tokens, 0)) + picture[:, None])


class TinyModel(nn.Module):
    """The interface of `Meteor` over a few hundred parameters; a plan that fuses dims the image."""

    width: int = WIDTH

    def setup(self):
        self.clip = Encoder(self.width)
        self.llama = Decoder(self.width)

    def __call__(self, batch, *, plan):
        hidden = self.hidden_states(batch, plan=plan)
        return Forward(logits=self.logits(hidden.x), trace=hidden.trace)

    def hidden_states(self, batch, *, plan):
        if plan.missing_ranks:
            raise ValueError("no feature ranks.")
        keep = plan.fusion_steps[0].budget.keep if plan.fusion_steps else 4
        if keep > 4:
            raise ValueError(f"a budget of {keep} tokens, but there are 4.")
        pixels = batch.images.reshape(batch.images.shape[0], -1).astype(jnp.float32) / 255
        x = self.llama(batch.tokens, self.clip(pixels) * (keep / 4))
        fused = jnp.broadcast_to(jnp.arange(keep) % 2, (batch.images.shape[0], keep))
        trace = PruneTrace(encode={}, fused_encoder=fused, fused_patch_index=fused)
        return HiddenStates(x=x, trace=trace)

    def logits(self, x):
        return self.llama.head(x)

    @nn.nowrap
    def head_params(self, params):
        return {"llama": {"head": params["llama"]["head"]}}


CONFIG = MeteorConfig(encoders=default_encoders("clip", "pix2struct"))


@dataclasses.dataclass(frozen=True)
class TinyFamily(Eagle):
    """EAGLE's losses and rules around `TinyModel`."""

    config: MeteorConfig = CONFIG
    width: int = WIDTH

    @property
    def module(self):
        return TinyModel(self.width)


def make_experiment(*, plans=None, **train_fields):
    """`train_fields` replace those of `TrainConfig`; a dict replaces fields of a stage."""
    stage = {"batch_size": 8, "learning_rate": 1e-2, "plans": ("full",)}
    values = {
        "mesh": {},
        "pretrain": stage | {"task": "captioning", "steps": 4},
        "finetune": stage | {"steps": 4, "plans": ("pruned",), "calibrate_before": True},
        "log_every": 2,
        "checkpoint_every": 2,
    }
    for name, value in train_fields.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return Experiment(
        model=CONFIG,
        data=DataConfig(sources=("easy-vqa",), held_out=8),
        train=build(TrainConfig, values, where="train"),
        plans=PLANS | (plans or {}),
    )


def make_batch(seed, *, rows=8, side=SIDE, vocabulary=VOCABULARY):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, TEXT_LENGTH)).astype(np.int32)
    tokens[:, 0] = IMAGE_TOKEN
    text_valid = np.arange(TEXT_LENGTH) < rng.integers(4, TEXT_LENGTH + 1, (rows, 1))
    labels = np.where(text_valid & (np.arange(TEXT_LENGTH) > 1), tokens, IGNORE_LABEL)
    return Batch(
        images=rng.integers(0, 256, (rows, 1, side, side, 3)).astype(np.uint8),
        image_valid=np.ones((rows, 1), bool),
        tokens=tokens,
        text_valid=text_valid,
        labels=labels.astype(np.int32),
        example_id=rng.integers(0, 1000, rows).astype(np.int32),
    )


def batches(stage, *, first_batch, shard):
    seeds = grain.MapDataset.range(20).seed(len(stage.name)).shuffle().repeat()[first_batch:]
    rows = stage.config.batch_size // shard.count
    mine = slice(shard.index * rows, (shard.index + 1) * rows)
    made = seeds.map(lambda seed: make_batch(int(seed), rows=stage.config.batch_size))
    made = made.map(lambda batch: jax.tree.map(lambda x: x[mine], batch))
    return iter(made.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def held_out(stage, *, shard):
    rows = stage.config.batch_size // shard.count
    mine = slice(shard.index * rows, (shard.index + 1) * rows)
    return [jax.tree.map(lambda x: x[mine], make_batch(seed)) for seed in (100, 101)]


@dataclasses.dataclass(frozen=True)
class Data:
    """What `TrainingData` is for a whole experiment."""

    batches: Any = batches
    held_out: Any = held_out


def run(workdir, experiment, **options):
    """Trains on one device, unless told otherwise."""
    options = {
        "model": TinyFamily(),
        "data": Data(),
        "calibrate": lambda params: Calibration(ranks={"energy 0.99": RANKS}),
        "devices": jax.devices()[:1],
        "config": {"written by": "a test"},
    } | options
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    try:
        return train(experiment, workdir=Path(workdir), **options)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def read_steps(workdir):
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return [{k: v for k, v in row.items() if k not in CLOCK_FIELDS} for row in rows]


def make_whole_experiment(**train_fields):
    """One that uses whatever must survive an interruption."""
    finetune = {"reinit": ("llama/head",)} | train_fields.pop("finetune", {})
    return make_experiment(ema_decay=0.9, held_out_every=3, finetune=finetune, **train_fields)


def main(workdir, kill_at_step=None):
    """Trains; at `kill_at_step` the process ends as a power cut would end it."""

    def evaluate(params, *, step, final):
        if step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    run(workdir, make_whole_experiment(eval_every=1), evaluate=evaluate)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
