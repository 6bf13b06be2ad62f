"""Turns PyTorch checkpoints into workdirs of this project, and back.

    meteor convert --source=EAGLE_DIR --output=WORKDIR
    meteor convert --to_torch --source=WORKDIR --output=EAGLE_DIR

docs/convert.md says what is read, and what is checked.
"""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import jax
from absl import flags, logging
from rich.console import Console

from meteor_jax.cli.flags import define_output
from meteor_jax.config import ConfigError
from meteor_jax.convert.exporting import export_checkpoint
from meteor_jax.convert.formats import all_formats
from meteor_jax.convert.loading import AS_IS, DTYPES, convert_checkpoint

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def define_flags() -> None:
    flags.DEFINE_string(
        "source",
        None,
        "Folder of a checkpoint (safetensors or .bin, with its config.json), or one file; with "
        "--to_torch a workdir.",
        required=True,
    )
    define_output("What is written; it must not exist yet.", required=True)
    flags.DEFINE_enum("format", None, list(all_formats()), "What --source is. Default: recognised.")
    flags.DEFINE_enum(
        "dtype",
        AS_IS,
        list(DTYPES),
        f"The numbers written; {AS_IS} leaves each as it is, or with --to_torch as it was.",
    )
    flags.DEFINE_multi_string(
        "set",
        [],
        "FIELD=VALUE, a field of the model's config that the checkpoint does not tell, such as "
        "encoders.clip.num_heads=2",
    )
    flags.DEFINE_bool(
        "split_projector",
        False,
        "Start METEOR's projector an encoder from slices of EAGLE's single one.",
    )
    flags.DEFINE_string(
        "name", None, "What a lone encoder is called in the model. Default: its type, such as clip."
    )
    flags.DEFINE_bool("to_torch", False, "Write a workdir back as safetensors, for EAGLE.")
    flags.DEFINE_string("shard_size", "2GB", "With --to_torch: the most that one file holds.")


def parse_bytes(text: str) -> int:
    """2GB, 500MB or 1000 as a number of bytes.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    if not match or match[2] not in UNITS:
        raise ConfigError(f"--shard_size: expected a size such as 2GB or 500MB, got '{text}'.")
    return int(float(match[1]) * UNITS[match[2]])


def main(options: flags.FlagValues) -> None:
    """Converts in the direction that the flags say."""
    # A conversion needs no accelerator, and takes none from a job that runs.
    jax.config.update("jax_platforms", "cpu")
    # One that is told to stop tidies up first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Orbax warns of every checkpoint that is not a training run's.
    logging.set_verbosity(logging.ERROR)
    console, source, output = Console(), Path(options.source), Path(options.output)
    if options.to_torch:
        export_checkpoint(
            source,
            output,
            dtype=options.dtype,
            shard_bytes=parse_bytes(options.shard_size),
            console=console,
        )
    else:
        convert_checkpoint(
            source,
            output,
            format_name=options.format,
            dtype=options.dtype,
            overrides=options.set,
            split_projector=options.split_projector,
            name=options.name,
            console=console,
        )
    console.print(f"{output} is written.")
