"""What adaptive cuts save: prefill of one decoder, unpruned and at each bucket, in one run.

    python -m meteor_jax.tools.bench_cuts

Random weights; the time depends on shapes alone. Every row is the same jitted function with
another plan: `bucket i` makes λ so small or large that all examples land in that bucket,
`adaptive` lets each question decide. Compile time stands apart; medians over --repeats, with the
fastest and the slowest.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from meteor_jax.models.fusion import splice
from meteor_jax.models.llama import Llama, LlamaConfig
from meteor_jax.models.prefill import run_segments
from meteor_jax.pruning.plan import DecodePlan
from meteor_jax.types import IMAGE_TOKEN, Array, VisualTokens


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one plan: compiling, and the median, fastest and slowest of its runs."""

    name: str
    compile_s: float
    median_s: float
    fastest_s: float
    slowest_s: float
    num_kept: list[list[int]]


def bench_prefill(
    config: LlamaConfig, *, plans: dict[str, DecodePlan | None], batch: int, num_visual: int,
    num_text: int, repeats: int,
) -> list[Timing]:
    """Times the prefill of `batch` prompts of one image under each plan, alternating between the
    plans so that a slow moment of the machine falls on all."""
    llama = Llama(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, config.vocab_size, (batch, num_text)).astype(np.int32)
    tokens[:, 0] = IMAGE_TOKEN
    x = rng.normal(0, 1, (batch, 1, num_visual, config.width)).astype(np.float32)
    # Rows whose text looks at the image more or less: what an easy and a hard question do.
    x *= np.linspace(0.25, 2.0, batch).astype(np.float32)[:, None, None, None]
    place = np.broadcast_to(np.arange(num_visual, dtype=np.int32), x.shape[:-1])
    visual = VisualTokens(x, np.zeros_like(place), place, place, span=num_visual)

    def init(key: Array) -> Any:
        embedded = llama.init(key, jnp.zeros((1, 1), jnp.int32), method="embed")["params"]
        zeros = jnp.zeros((1, 1, config.width))
        position = jnp.zeros((1, 1), jnp.int32)
        layers = llama.init(key, zeros, position, start=0, stop=1, method="run")["params"]
        return embedded | layers

    variables = {"params": jax.jit(init)(jax.random.key(0))}

    @functools.partial(jax.jit, static_argnames="plan")
    def prefill(variables: Any, visual: VisualTokens, tokens: Array, plan: DecodePlan | None):
        valid = jnp.ones((batch, 1), bool)
        text = llama.apply(variables, jnp.maximum(tokens, 0), method="embed")
        sequence = splice(
            text, tokens=tokens, text_valid=jnp.ones(tokens.shape, bool), visual=visual,
            image_valid=valid,
        )
        run = run_segments(
            llama, variables, sequence, plan=plan, num_text=num_text, num_images=valid.sum(1),
            max_images=1, visual_per_image=num_visual, num_new=0,
        )
        return run.sequence.x, run.segments, [cut.num_kept for cut in run.cuts]

    compile_s, kept, seconds = {}, {}, {name: [] for name in plans}
    for name, plan in plans.items():
        started = time.perf_counter()
        kept[name] = jax.device_get(prefill(variables, visual, tokens, plan)[2])
        compile_s[name] = time.perf_counter() - started
    for _ in range(repeats):
        for name, plan in plans.items():
            started = time.perf_counter()
            jax.block_until_ready(prefill(variables, visual, tokens, plan))
            seconds[name].append(time.perf_counter() - started)
    return [
        Timing(
            name, compile_s[name], float(np.median(times)), min(times), max(times),
            [count.tolist() for count in kept[name]],
        )
        for name, times in seconds.items()
    ]


def bucket_plans(*, depth: int, num_visual: int, scale: float) -> dict[str, DecodePlan | None]:
    """Unpruned; METEOR's three cuts held at their smallest and largest bucket; and adaptive."""
    layers = (depth // 4, depth // 2, 3 * depth // 4)
    keep = (num_visual // 4, num_visual // 8, num_visual // 16)
    plan = DecodePlan(layers=layers, keep=keep, limits=(0.5, 2.0), heads=4)

    def with_scale(value: float) -> DecodePlan:
        return dataclasses.replace(plan, scale=(value,) * 3)

    return {
        "full": None,
        "largest bucket": with_scale(1e9),
        "smallest bucket": with_scale(1e-9),
        "adaptive": with_scale(scale),
    }


def main(argv: list[str]) -> None:
    del argv
    config = LlamaConfig(
        depth=DEPTH.value, width=WIDTH.value, num_heads=WIDTH.value // 64,
        num_kv_heads=WIDTH.value // 64, mlp_dim=WIDTH.value * 11 // 4, vocab_size=1000,
    )
    timings = bench_prefill(
        config, plans=bucket_plans(depth=config.depth, num_visual=VISUAL.value, scale=SCALE.value),
        batch=BATCH.value, num_visual=VISUAL.value, num_text=TEXT.value, repeats=REPEATS.value,
    )
    title = (
        f"prefill of {BATCH.value} × ({VISUAL.value} + {TEXT.value}) tokens, {config.depth} layers "
        f"× {config.width}, {jax.default_backend()}, jax {jax.__version__}"
    )
    columns = ("plan", "median ms", "fastest–slowest", "× full", "compile s", "kept")
    table = Table(*columns, title=title)
    for timing in timings:
        table.add_row(
            timing.name, f"{timing.median_s * 1e3:.0f}",
            f"{timing.fastest_s * 1e3:.0f}–{timing.slowest_s * 1e3:.0f}",
            f"{timings[0].median_s / timing.median_s:.2f}", f"{timing.compile_s:.1f}",
            " → ".join(str(count) for count in timing.num_kept),
        )
    Console().print(table)
    if OUTPUT.value:
        rows = [json.dumps(dataclasses.asdict(timing)) for timing in timings]
        Path(OUTPUT.value).write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    DEPTH = flags.DEFINE_integer("depth", 8, "Layers of the decoder.")
    WIDTH = flags.DEFINE_integer("width", 512, "Its width; heads are 64 wide.")
    VISUAL = flags.DEFINE_integer("visual", 1024, "Visual tokens of the image.")
    TEXT = flags.DEFINE_integer("text", 32, "Text tokens around it.")
    BATCH = flags.DEFINE_integer("batch", 2, "Prompts.")
    SCALE = flags.DEFINE_float("scale", 100.0, "λ of the adaptive row.")
    REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each plan.")
    OUTPUT = flags.DEFINE_string("output", None, "File for one JSON object a row.")
    app.run(main)
