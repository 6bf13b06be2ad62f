"""Trains each encoder of a config by itself, on pictures of digits, letters and shapes.

    meteor pretrain-encoders --config=configs/small.py --workdir=runs/small_encoders

WORKDIR/ENCODER then holds a checkpoint, to be named in the config's `init_from`; an encoder that
has one is not trained again.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from meteor_jax.cli.flags import config_document, define_config, define_workdir, read_config
from meteor_jax.training.pretrain_encoders import pretrain


def define_flags() -> None:
    define_config()
    define_workdir("Folder that gets a folder for each encoder.")
    flags.DEFINE_integer("steps", 6000, "Steps of each encoder.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 16, "Pictures of one step.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 3e-3, "The peak.", lower_bound=0.0)
    flags.DEFINE_integer("num_images", 20_000, "Different pictures.", lower_bound=1)


def main(options: flags.FlagValues) -> None:
    """Trains what is not trained yet."""
    pretrain(
        read_config(options),
        workdir=Path(options.workdir),
        config=config_document(options),
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        num_images=options.num_images,
    )
