"""The smallest real model on made-up data; also a program that a test can kill.

Run as `python -m tests.training.tiny_run WORKDIR [KILL_AFTER_STEP]`.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import grain
import numpy as np

from meteor_jax.config import build
from meteor_jax.data.pipeline import DataConfig
from meteor_jax.models.meteor import Meteor, MeteorConfig
from meteor_jax.pruning.plan import Calibration
from meteor_jax.training.experiment import Experiment, TrainConfig
from meteor_jax.training.loop import train
from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN, Batch

TEXT_LENGTH, SIDE, VOCABULARY = 8, 16, 32
RANKS = {"clip": (2.0, 2.0, 2.0), "pix2struct": (1.0, 1.0, 1.0)}
PLANS = {"pruned": "meteor(encode=(6, 5, 4), fuse=3)"}


def make_experiment(**train_fields):
    model = {
        "encoders": ("clip", "pix2struct"),
        "clip": dict(image_size=16, patch_size=8, width=8, depth=3, num_heads=2, mlp_dim=8),
        "pix2struct": dict(
            grid_side=2, patch_size=8, width=8, depth=3, num_heads=2, mlp_dim=8, num_positions=4
        ),
        "llama": dict(
            depth=2, width=8, num_heads=2, num_kv_heads=1, mlp_dim=16, vocab_size=VOCABULARY
        ),
        "image_size": SIDE,
    }
    stage = dict(batch_size=8, learning_rate=1e-2, plans=("full",))
    values = {
        "mesh": dict(data=-1),
        "pretrain": stage | dict(kind="caption", steps=4),
        "finetune": stage | dict(
            steps=4, plans=("pruned",), before="calibrate_ranks", trainable=("llama", "projector")
        ),
        "log_every": 2,
        "checkpoint_every": 2,
    }
    for name, value in train_fields.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return Experiment(
        model=build(MeteorConfig, model),
        data=DataConfig(sources=("easy-vqa",)),
        train=build(TrainConfig, values, where="train"),
        plans=PLANS,
    )


def make_batch(seed, *, rows=8):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (rows, TEXT_LENGTH)).astype(np.int32)
    tokens[:, 0] = IMAGE_TOKEN
    text_valid = np.arange(TEXT_LENGTH) < rng.integers(4, TEXT_LENGTH + 1, (rows, 1))
    labels = np.where(text_valid & (np.arange(TEXT_LENGTH) > 1), tokens, IGNORE_LABEL)
    return Batch(
        images=rng.integers(0, 256, (rows, 1, SIDE, SIDE, 3)).astype(np.uint8),
        image_valid=np.ones((rows, 1), bool),
        tokens=tokens,
        text_valid=text_valid,
        labels=labels.astype(np.int32),
        example_id=rng.integers(0, 1000, rows).astype(np.int32),
    )


def open_data(stage):
    seeds = grain.MapDataset.range(20).seed(len(stage.name)).shuffle().repeat()
    batches = seeds.map(lambda seed: make_batch(int(seed), rows=stage.config.batch_size))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def run(workdir, experiment, **options):
    options = {"open_data": open_data, "calibrate": lambda params: Calibration(ranks=RANKS)} | options
    return train(
        experiment, model=Meteor(experiment.model), workdir=Path(workdir), config={}, **options
    )


@dataclasses.dataclass
class KillAfter:
    """A stage's data that kills its own process, as a power cut would, after so many batches."""

    data: grain.DatasetIterator
    batches_left: int

    def __next__(self):
        if self.batches_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.batches_left -= 1
        return next(self.data)


if __name__ == "__main__":
    run(sys.argv[1], make_experiment())
