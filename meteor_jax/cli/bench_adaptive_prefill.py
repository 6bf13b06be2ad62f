"""Times the layers after a pruning step where rows keep unequal numbers of tokens.

    meteor bench-adaptive-prefill --repeats=3 --output=adaptive.jsonl

"fixed" computes the mean for every row, "adaptive" packs the rows into the smallest static total
that holds them, "padded" pads every row to the longest there may be. Below, what a whole prefill
needs beside its arguments and results, unpruned and with three prune steps.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from meteor_jax.cli.flags import define_output
from meteor_jax.config import ConfigError
from meteor_jax.models.decoders.llama.model import LlamaConfig
from meteor_jax.perf.bench.adaptive_prefill import (
    NUM_ROWS,
    Decoder,
    bench_rows,
    temporaries,
    three_steps,
)

HEAD_WIDTH = 64


def define_flags() -> None:
    flags.DEFINE_integer(
        "depth", 8, "Layers of the decoder; the upper half is timed.", lower_bound=4
    )
    flags.DEFINE_integer(
        "width", 512, "Its width, a multiple of 64: heads are 64 wide.", lower_bound=HEAD_WIDTH
    )
    flags.DEFINE_integer("visual_tokens", 1024, "Visual tokens of the image.", lower_bound=16)
    flags.DEFINE_integer("text_tokens", 32, "Text tokens around the image.", lower_bound=1)
    flags.DEFINE_integer(
        "batch_size", 8, f"Rows of a batch; a divisor of {NUM_ROWS}.", lower_bound=1
    )
    flags.DEFINE_integer("keep", 394, "Visual tokens that a row keeps, on average.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "Timed runs over all batches.", lower_bound=1)
    define_output("File for one JSON object a row.")


def main(options: flags.FlagValues) -> None:
    """Prints a row for each way to run the rows, and the compiler's temporaries."""
    if options.width % HEAD_WIDTH:
        raise ConfigError(f"--width: expected a multiple of {HEAD_WIDTH}, got {options.width}.")
    if NUM_ROWS % options.batch_size:
        raise ConfigError(
            f"--batch_size: expected a divisor of {NUM_ROWS}, got {options.batch_size}."
        )
    num_heads = options.width // HEAD_WIDTH
    config = LlamaConfig(
        depth=options.depth,
        width=options.width,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        mlp_dim=options.width * 11 // 4,
        vocab_size=1000,
    )
    decoder = Decoder.make(config, num_visual=options.visual_tokens, num_text=options.text_tokens)
    keep, start, batch = options.keep, options.depth // 2, options.batch_size
    timings = bench_rows(decoder, mean=keep, start=start, batch=batch, repeats=options.repeats)
    table = Table(
        "rows",
        "ms",
        "fastest–slowest",
        "÷ fixed",
        "compile s",
        "tokens computed",
        title=f"{options.depth - start} layers × {options.width}, {batch} rows of "
        f"{options.text_tokens} + {keep / 2:.0f}–{1.5 * keep:.0f} tokens, "
        f"{jax.default_backend()}, jax {jax.__version__}",
    )
    for timing in timings:
        table.add_row(
            timing.name,
            f"{timing.median_s * 1e3:.0f}",
            f"{timing.fastest_s * 1e3:.0f}–{timing.slowest_s * 1e3:.0f}",
            f"{timing.median_s / timings[0].median_s:.2f}",
            f"{timing.compile_s:.1f}",
            f"{timing.computed:.0f}",
        )
    console = Console()
    console.print(table)
    full, pruned = (
        temporaries(decoder, steps=steps, batch=2) / 1e6 for steps in ((), three_steps(decoder))
    )
    console.print(
        f"temporaries of a prefill of 2 × {options.visual_tokens} tokens: {full:.0f} MB unpruned, "
        f"{pruned:.0f} MB with three prune steps ({pruned / full:.2f})."
    )
    if options.output:
        rows = [json.dumps(dataclasses.asdict(timing)) for timing in timings]
        Path(options.output).write_text("\n".join(rows) + "\n")
