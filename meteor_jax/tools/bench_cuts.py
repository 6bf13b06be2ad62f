"""What an adaptive budget costs beside a fixed one of the same mean: prefill of one decoder.

    python -m meteor_jax.tools.bench_cuts --batch=8 --layers=4 --keep=394

Random weights. λ and the static totals are measured on 64 rows, as `calibrate` does, and batches of
these rows are timed, all plans in turns, so that a slow moment of the machine falls on all.
"after" is what the layers after the first cut take, scoring included: the whole less the layers
before it alone. Compile time stands apart; medians over --repeats, with the fastest and slowest.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from meteor_jax.inference.budgets import chosen_mass
from meteor_jax.models.fusion import splice
from meteor_jax.models.llama import Llama, LlamaConfig
from meteor_jax.models.prefill import SegmentRun, run_segments
from meteor_jax.pruning.budgets import fit_edges, fit_scale
from meteor_jax.pruning.plan import DecodePlan
from meteor_jax.types import IMAGE_TOKEN, Array, VisualTokens

NUM_ROWS = 64  # that λ and totals are measured on


@flax.struct.dataclass
class Rows:
    """Prompts of one image: VisualTokens of [B, 1, N, D] and int32[B, T]."""

    visual: VisualTokens
    tokens: Array


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one plan: compiling, and the median, fastest and slowest of its runs.

    Attributes:
        kept, computed: visual tokens a row after each cut, mean over the rows.
        temp_bytes: of the compiled program.
    """

    name: str
    compile_s: float
    median_s: float
    fastest_s: float
    slowest_s: float
    kept: tuple[float, ...]
    computed: tuple[float, ...]
    temp_bytes: int


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder with random weights, and rows of noise that look at their image more or less."""

    llama: Llama
    variables: Any
    rows: Rows

    @classmethod
    def make(cls, config: LlamaConfig, *, num_visual: int, num_text: int) -> Decoder:
        llama, rng = Llama(config), np.random.default_rng(0)
        tokens = rng.integers(1, config.vocab_size, (NUM_ROWS, num_text)).astype(np.int32)
        tokens[:, 0] = IMAGE_TOKEN
        x = rng.normal(0, 1, (NUM_ROWS, 1, num_visual, config.width)).astype(np.float32)
        # What an easy and a hard question do; in no order.
        x *= rng.permutation(np.linspace(0.25, 2.0, NUM_ROWS).astype(np.float32)).reshape(
            -1, 1, 1, 1
        )
        place = np.broadcast_to(np.arange(num_visual, dtype=np.int32), x.shape[:-1])
        visual = VisualTokens(x, np.zeros_like(place), place, place, span=num_visual)

        @jax.jit
        def init(key: Array) -> Any:
            embedded = llama.init(key, jnp.zeros((1, 1), jnp.int32), method="embed")["params"]
            zeros, position = jnp.zeros((1, 1, config.width)), jnp.zeros((1, 1), jnp.int32)
            layers = llama.init(key, zeros, position, start=0, stop=1, method="run")["params"]
            return embedded | layers

        return cls(llama, {"params": init(jax.random.key(0))}, Rows(visual, tokens))

    def batches(self, size: int) -> Iterator[Rows]:
        for start in range(0, NUM_ROWS - size + 1, size):
            yield jax.device_put(jax.tree.map(lambda x, at=start: x[at : at + size], self.rows))

    def prefill(self, variables: Any, rows: Rows, plan: DecodePlan | None) -> SegmentRun:
        batch, num_text = rows.tokens.shape
        valid = jnp.ones((batch, 1), bool)
        text = self.llama.apply(variables, jnp.maximum(rows.tokens, 0), method="embed")
        sequence = splice(
            text, tokens=rows.tokens, text_valid=jnp.ones(rows.tokens.shape, bool),
            visual=rows.visual, image_valid=valid,
        )
        return run_segments(
            self.llama, variables, sequence, plan=plan, num_text=num_text, num_images=valid.sum(1),
            max_images=1, visual_per_image=rows.visual.num_tokens, num_new=0,
        )

    def calibrated(self, plan: DecodePlan, *, batch: int) -> DecodePlan:
        """`plan` with λ and totals measured cut after cut."""
        plan = dataclasses.replace(plan, scale=(1.0,) * len(plan.layers), num_totals=1)
        run = jax.jit(
            lambda variables, rows, plan: self.prefill(variables, rows, plan).cuts,
            static_argnames="plan",
        )
        available: np.ndarray | None = None
        for cut in range(len(plan.layers)):
            traces = [run(self.variables, rows, plan=plan)[cut] for rows in self.batches(batch)]
            mass = np.concatenate([chosen_mass(jax.device_get(t), plan=plan) for t in traces])
            reached = np.full(mass.shape, self.rows.visual.num_tokens)
            reached = reached if available is None else available
            low_high = plan.bounds(cut)
            scale = fit_scale(mass, low_high=low_high, target=plan.keep[cut], available=reached)
            kept = np.minimum(np.clip(np.round(scale * mass), *low_high), reached)
            edges = fit_edges([kept[i : i + 1] for i in range(len(kept))], high=low_high[1],
                              num_totals=3)
            plan = dataclasses.replace(
                plan, scale=(*plan.scale[:cut], scale, *plan.scale[cut + 1 :]),
                edges=(*plan.edges, edges),
            )
            available = kept.astype(int)
        return dataclasses.replace(plan, num_totals=3)


def bench_prefill(
    decoder: Decoder, *, plans: dict[str, DecodePlan | None], batch: int, repeats: int
) -> list[Timing]:
    """Times the prefill of batches of `batch` rows under each plan."""
    batches = list(decoder.batches(batch))
    compiled, compile_s, cuts = {}, {}, {}
    for name, plan in plans.items():
        function = jax.jit(functools.partial(_program, decoder, plan))
        started = time.perf_counter()
        compiled[name] = function.lower(decoder.variables, batches[0]).compile()
        compile_s[name] = time.perf_counter() - started
        cuts[name] = [compiled[name](decoder.variables, rows)[-1] for rows in batches]
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(repeats):
        for rows in batches:
            for name, run in compiled.items():
                started = time.perf_counter()
                jax.block_until_ready(run(decoder.variables, rows))
                seconds[name].append(time.perf_counter() - started)
    return [
        Timing(
            name, compile_s[name], float(np.median(times)), min(times), max(times),
            kept=_mean(cuts[name], "num_kept"), computed=_mean(cuts[name], "num_computed"),
            temp_bytes=compiled[name].memory_analysis().temp_size_in_bytes,
        )
        for name, times in seconds.items()
    ]


def _program(decoder: Decoder, plan: DecodePlan | None, variables: Any, rows: Rows) -> Any:
    run = decoder.prefill(variables, rows, plan)
    return run.sequence.x, run.segments, run.cuts


def _mean(batches: Sequence[Any], field: str) -> tuple[float, ...]:
    return tuple(
        float(np.mean([getattr(cut, field) for cut in of_cut]))
        for of_cut in zip(*batches, strict=True)
    )


def compare(
    config: LlamaConfig, *, layers: tuple[int, ...], keep: tuple[int, ...], batch: int,
    num_visual: int, num_text: int, repeats: int,
) -> list[Timing]:
    """Unpruned, the layers before the first cut alone, a fixed budget, and an adaptive one."""
    decoder = Decoder.make(config, num_visual=num_visual, num_text=num_text)
    plan = DecodePlan(layers=layers, keep=keep, heads=4)
    adaptive = decoder.calibrated(plan, batch=batch)
    plans = {"full": None, "fixed": dataclasses.replace(plan, budget="fixed"), "adaptive": adaptive}
    before = dataclasses.replace(decoder, llama=Llama(dataclasses.replace(config, depth=layers[0])))
    timings = bench_prefill(decoder, plans=plans, batch=batch, repeats=repeats)
    return timings + bench_prefill(before, plans={"before": None}, batch=batch, repeats=repeats)


def main(argv: list[str]) -> None:
    del argv
    config = LlamaConfig(
        depth=DEPTH.value, width=WIDTH.value, num_heads=WIDTH.value // 64,
        num_kv_heads=WIDTH.value // 64, mlp_dim=WIDTH.value * 11 // 4, vocab_size=1000,
    )
    timings = compare(
        config, layers=tuple(map(int, LAYERS.value)), keep=tuple(map(int, KEEP.value)),
        num_visual=VISUAL.value, num_text=TEXT.value, batch=BATCH.value, repeats=REPEATS.value,
    )
    title = (
        f"prefill of {BATCH.value} × ({VISUAL.value} + {TEXT.value}) tokens, {config.depth} layers "
        f"× {config.width}, {jax.default_backend()}, jax {jax.__version__}"
    )
    by_name = {timing.name: timing for timing in timings}
    before = by_name["before"].median_s
    columns = (
        "plan", "median ms", "fastest–slowest", "after ms", "÷ fixed", "compile s", "kept",
        "computed", "temporaries MB",
    )
    table = Table(*columns, title=title)
    fixed = by_name["fixed"].median_s - before
    for timing in timings:
        after = timing.median_s - before
        table.add_row(
            timing.name, f"{timing.median_s * 1e3:.0f}",
            f"{timing.fastest_s * 1e3:.0f}–{timing.slowest_s * 1e3:.0f}",
            f"{after * 1e3:.0f}", f"{after / fixed:.2f}", f"{timing.compile_s:.1f}",
            " → ".join(f"{count:.0f}" for count in timing.kept),
            " → ".join(f"{count:.0f}" for count in timing.computed),
            f"{timing.temp_bytes / 1e6:.0f}",
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
    BATCH = flags.DEFINE_integer("batch", 8, "Prompts; 64 at most.")
    LAYERS = flags.DEFINE_list("layers", ["4"], "The first layer after each cut.")
    KEEP = flags.DEFINE_list("keep", ["394"], "Visual tokens kept at each cut, on average.")
    REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of each plan over all batches.")
    OUTPUT = flags.DEFINE_string("output", None, "File for one JSON object a row.")
    app.run(main)
