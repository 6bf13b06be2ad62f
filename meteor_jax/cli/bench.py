"""Times plans against one another, with the same weights, in one run.

    meteor bench --config=configs/bench_x4_eighth.py --plans=full,meteor --output=bench.jsonl

An image and a question to the end of the answer: encode (encoders, projectors, fusion), prefill (up
to the first token), decode. The weights are random and made on the device. The plans are
interleaved, so that a slow moment of the machine falls on all; medians, with the fastest and the
slowest. Compile time is reported apart.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags
from rich.console import Console

from meteor_jax.cli.flags import (
    define_calibration,
    define_config,
    define_output,
    define_plans,
    read_calibration,
    read_config,
    read_plans,
)
from meteor_jax.config import ConfigError
from meteor_jax.experiment.plans import resolve_plans
from meteor_jax.perf.bench.measure import bench, bench_data
from meteor_jax.perf.bench.table import draw, print_table


def define_flags() -> None:
    define_config()
    define_plans("full,meteor")
    define_calibration()
    flags.DEFINE_list("batch_sizes", ["1", "8"], "Rows answered at once, separated by commas.")
    flags.DEFINE_integer("repeats", 5, "Timed runs of each plan.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 16, "Tokens of an answer.", lower_bound=2)
    flags.DEFINE_integer("text_tokens", 64, "Text tokens around the image.", lower_bound=2)
    flags.DEFINE_bool("train", False, "Time a training step too.")
    flags.DEFINE_bool("data", False, "Time the data pipeline alone too.")
    define_output("File for a JSON object a row; a plot beside it.")


def main(options: flags.FlagValues) -> None:
    """Prints a row a batch size and plan."""
    sizes = [int(size) if size.strip().isdigit() else 0 for size in options.batch_sizes]
    if min(sizes, default=0) < 1:
        raise ConfigError(
            f"--batch_sizes: expected numbers from 1 up, got {','.join(options.batch_sizes)}."
        )
    experiment = read_config(options)
    plans = resolve_plans(
        read_plans(options), library=experiment.plans, calibration=read_calibration(options)
    )
    rows = bench(
        experiment,
        plans=plans,
        batch_sizes=sizes,
        repeats=options.repeats,
        new_tokens=options.new_tokens,
        text_tokens=options.text_tokens,
        train=options.train,
    )
    if options.data:
        speed = bench_data(experiment, batch=sizes[0])
        rows = [row | {"data_examples_per_s": speed} for row in rows]
    console = Console(width=None if sys.stdout.isatty() else 160)
    print_table(rows, console=console)
    if options.data:
        fastest = max(row["examples_per_s"] for row in rows)
        console.print(
            f"data pipeline alone: {speed:.1f} examples/s, {speed / fastest:.1f} × the fastest row"
        )
    if options.output:
        path = Path(options.output)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        draw(path.with_suffix(".png"), rows)
