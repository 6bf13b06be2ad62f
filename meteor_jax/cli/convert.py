"""Turns PyTorch checkpoints into workdirs of this project, and back.

meteor convert --source EAGLE_DIR --output WORKDIR
meteor convert --to-torch --source WORKDIR --output EAGLE_DIR
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging
from rich.console import Console

from meteor_jax.convert.exporting import export_checkpoint
from meteor_jax.convert.formats import all_formats
from meteor_jax.convert.loading import AS_IS, DTYPES, convert_checkpoint
from meteor_jax.convert.sources import ConversionError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="meteor convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--source",
        type=Path,
        required=True,
        help="folder of a checkpoint (safetensors or .bin, with its config.json), or one file; "
        "with --to-torch a workdir",
    )
    result.add_argument(
        "--output", type=Path, required=True, help="what is written; it must not exist yet"
    )
    result.add_argument(
        "--format",
        choices=all_formats(),
        help="what --source is (default: recognised)",
        metavar="NAME",
    )
    result.add_argument(
        "--dtype",
        choices=DTYPES,
        default=AS_IS,
        help="dtype of the numbers written (default: each as it is, or with --to-torch as it was)",
    )
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the model's config that the checkpoint does not tell, such as "
        "encoders.clip.num_heads=2; may be repeated",
    )
    result.add_argument(
        "--split-projector",
        action="store_true",
        help="start METEOR's projector an encoder from slices of EAGLE's single one",
    )
    result.add_argument(
        "--to-torch", action="store_true", help="write a workdir back as safetensors, for EAGLE"
    )
    result.add_argument(
        "--shard-size",
        type=_bytes,
        default="2GB",
        metavar="SIZE",
        help="with --to-torch: the most that one file holds (default: 2GB)",
    )
    result.epilog = f"formats: {', '.join(all_formats())}. docs/convert.md says more."
    return result


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    if not match or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"expected a size such as 2GB or 500MB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2, after a message, for what the user can put right."""
    args = parser().parse_args(argv)
    # Orbax warns of every checkpoint that is not a training run's.
    logging.set_verbosity(logging.ERROR)
    console = Console()
    try:
        if args.to_torch:
            export_checkpoint(
                args.source,
                args.output,
                dtype=args.dtype,
                shard_bytes=args.shard_size,
                console=console,
            )
        else:
            convert_checkpoint(
                args.source,
                args.output,
                format_name=args.format,
                dtype=args.dtype,
                overrides=args.set,
                split_projector=args.split_projector,
                console=console,
            )
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    console.print(f"{args.output} is written.")
    return 0


if __name__ == "__main__":
    # A conversion needs no accelerator, and takes none from a job that runs.
    jax.config.update("jax_platforms", "cpu")
    # One that is told to stop tidies up first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
