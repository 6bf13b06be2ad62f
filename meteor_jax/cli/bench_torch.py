"""Times every part of a model against the same part in PyTorch, on the same machine, in one run.

    meteor bench-torch --config=configs/bench_x4_eighth.py --repeats=3

Needs torch and transformers. Sizes are the config's, weights random, attention PyTorch's own
(`scaled_dot_product_attention`). Both sides are interleaved; medians, fastest and slowest.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from meteor_jax.cli.flags import define_config, define_output, read_config
from meteor_jax.config import ConfigError
from meteor_jax.perf.bench.torch_comparison import DTYPES, bench_torch


def define_flags() -> None:
    define_config()
    flags.DEFINE_list("dtypes", list(DTYPES), "float32, bfloat16 or both, separated by commas.")
    flags.DEFINE_integer("repeats", 5, "Timed runs of each side.", lower_bound=1)
    define_output("File for a JSON object a row.")


def main(options: flags.FlagValues) -> None:
    """Prints a row a part and dtype."""
    unknown = [dtype for dtype in options.dtypes if dtype not in DTYPES]
    if unknown or not options.dtypes:
        raise ConfigError(f"--dtypes: expected names out of {DTYPES}, got '{','.join(unknown)}'.")
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("comparing with PyTorch needs torch: pip install torch.")
    model, rows = read_config(options).model, []
    for dtype in options.dtypes:
        rows += bench_torch(model, dtype=dtype, repeats=options.repeats)
    title = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    table = Table("part", "dtype", "ours ms", "torch ms", "ours / torch", title=title)
    for row in rows:
        cells = [_milliseconds(row, side) for side in ("ours_s", "torch_s")]
        table.add_row(row["part"], row["dtype"], *cells, f"{row['ratio']:.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if options.output:
        Path(options.output).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _milliseconds(row: dict[str, Any], name: str) -> str:
    low, high = row["spread"][name]
    return f"{1e3 * row[name]:.0f} ({1e3 * low:.0f}–{1e3 * high:.0f})"
