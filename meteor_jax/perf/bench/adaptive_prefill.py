"""What the layers after a prune step cost where rows keep unequal numbers of tokens.

Random weights, and K spread evenly between half and one and a half of its mean, which is every
batch's, since noise looks at every image alike. "fixed" computes the mean for every row, "adaptive"
packs the rows into the smallest static total that holds them (`prefill.run_rows`), the totals
measured as `calibrate` does, "padded" pads every row to the longest there may be. All in turns, so
that a slow moment of the machine falls on all; compile time stands apart; medians over `repeats` of
all batches, with the fastest and the slowest.

Below, what a whole prefill needs beside its arguments and results: the compiler's temporaries,
unpruned and with three prune steps.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.models.decoders.llama.layer_runs import run_rows
from meteor_jax.models.decoders.llama.model import Llama, LlamaConfig
from meteor_jax.models.eagle.fusion import splice
from meteor_jax.models.eagle.prefill import run_decoder
from meteor_jax.pruning.budgets import Adaptive
from meteor_jax.pruning.methods.text_attention import TextAttention
from meteor_jax.pruning.ops.budgets import fit_edges
from meteor_jax.pruning.plan import PrunePlan, Step, decoder_steps
from meteor_jax.types import IMAGE_TOKEN, Array, Sequence, VisualTokens

NUM_ROWS = 64  # that are drawn, and that the totals are measured on


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one way to run the rows: compiling, and the median, fastest and slowest run.

    Attributes:
        computed: visual tokens a row, mean over the batches.
    """

    name: str
    compile_s: float
    median_s: float
    fastest_s: float
    slowest_s: float
    computed: float


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder with random weights, and the sizes of its rows."""

    llama: Llama
    variables: Any
    num_visual: int
    num_text: int

    @classmethod
    def make(cls, config: LlamaConfig, *, num_visual: int, num_text: int) -> Decoder:
        llama = Llama(config)

        @jax.jit
        def init(key: Array) -> Any:
            embedded = llama.init(key, jnp.zeros((1, 1), jnp.int32), method="embed")["params"]
            zeros, position = jnp.zeros((1, 1, config.width)), jnp.zeros((1, 1), jnp.int32)
            layers = llama.init(key, zeros, position, start=0, stop=1, method="run")["params"]
            return embedded | layers

        return cls(llama, {"params": init(jax.random.key(0))}, num_visual, num_text)


def bench_rows(
    decoder: Decoder, *, mean: int, start: int, batch: int, repeats: int
) -> list[Timing]:
    """Times the layers from `start` on over batches of rows of `mean` visual tokens on average."""
    batches = spread_kept(mean, batch=batch)
    kept = np.random.default_rng(0).permutation(batches.ravel())
    high = min(round(1.5 * mean), decoder.num_visual)
    edges = fit_edges([kept[i : i + 1] for i in range(NUM_ROWS)], high=high, num_totals=3)
    budget = Adaptive(mean, edges=edges)
    ways = {
        "fixed": (batch * mean,),
        "adaptive": budget.totals(rows=batch, available=decoder.num_visual),
        "padded": (batch * high,),
    }
    key = jax.random.key(1)
    compiled: dict[str, Callable[..., Any]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    compile_s, computed = {}, {}
    for name, totals in ways.items():
        function = jax.jit(functools.partial(_layers_after, decoder, start=start, totals=totals))
        begin = time.perf_counter()
        x = jax.random.normal(
            key, (batch, decoder.num_text + totals[-1] // batch, decoder.llama.config.width)
        )
        rows = (decoder.variables, x)
        program = function.lower(*rows, _lengths(batches[0], name, mean)).compile()
        compile_s[name] = time.perf_counter() - begin

        def run(of_batch: np.ndarray, *, name=name, rows=rows, program=program) -> Any:
            return jax.block_until_ready(program(*rows, _lengths(of_batch, name, mean)))

        compiled[name] = run
        computed[name] = float(np.mean([run(of_batch)[1].mean() for of_batch in batches]))
    for _ in range(repeats):
        for of_batch in batches:
            for name, run_compiled in compiled.items():
                begin = time.perf_counter()
                run_compiled(of_batch)
                seconds[name].append(time.perf_counter() - begin)
    return [
        Timing(
            name, compile_s[name], float(np.median(times)), min(times), max(times), computed[name]
        )
        for name, times in seconds.items()
    ]


def spread_kept(mean: int, *, batch: int) -> np.ndarray:
    """int[NUM_ROWS / batch, batch] between 0.5 and 1.5 times `mean`, which is each batch's mean if
    `batch` is even."""
    kept = np.linspace(0.5 * mean, 1.5 * mean, NUM_ROWS).reshape(batch, -1)
    kept[1::2] = kept[1::2, ::-1]  # dealt there and back, so that no batch gets the larger ones
    return np.round(kept.T).astype(np.int32)


def _lengths(kept: np.ndarray, name: str, mean: int) -> np.ndarray:
    return np.full_like(kept, mean) if name == "fixed" else kept


def _layers_after(
    decoder: Decoder, variables: Any, x: Array, kept: Array, *, start: int, totals: tuple[int, ...]
) -> tuple[Any, Array]:
    place = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    sequence = Sequence(
        x=x,
        position=place,
        valid=place < decoder.num_text + kept[:, None],
        text_index=place,
        visual=place,
    )
    layers, computed = run_rows(
        decoder.llama,
        variables,
        sequence,
        num_kept=kept,
        totals=totals,
        num_text=decoder.num_text,
        start=start,
        stop=decoder.llama.config.depth,
    )
    return (layers.sequence.x, layers.k, layers.v), computed


def temporaries(decoder: Decoder, *, steps: tuple[Step, ...], batch: int) -> int:
    """Bytes that a compiled prefill of `batch` prompts needs beside its arguments and results."""
    config = decoder.llama.config

    def prefill(variables: Any, x: Array, tokens: Array) -> Any:
        valid = jnp.ones((batch, 1), bool)
        place = jnp.broadcast_to(jnp.arange(decoder.num_visual), x.shape[:-1])
        visual = VisualTokens(x, place, place, place, span=decoder.num_visual)
        sequence = splice(
            decoder.llama.apply(variables, jnp.maximum(tokens, 0), method="embed"),
            tokens=tokens,
            text_valid=jnp.ones(tokens.shape, bool),
            visual=visual,
            image_valid=valid,
        )
        run = run_decoder(
            decoder.llama,
            variables,
            sequence,
            plan=PrunePlan(steps=steps),
            num_text=decoder.num_text,
            num_images=valid.sum(1),
            max_images=1,
            visual_per_image=decoder.num_visual,
            decode_capacity=0,
        )
        return run.sequence.x, run.ranges, run.prune_steps

    tokens = np.ones((batch, decoder.num_text), np.int32)
    tokens[:, 0] = IMAGE_TOKEN
    x = jax.ShapeDtypeStruct((batch, 1, decoder.num_visual, config.width), jnp.float32)
    compiled = jax.jit(prefill).lower(decoder.variables, x, tokens).compile()
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes


def three_steps(decoder: Decoder) -> tuple[Step, ...]:
    """METEOR's: at a quarter, a half and three quarters of the depth."""
    depth, count = decoder.llama.config.depth, decoder.num_visual
    return decoder_steps(
        (depth // 4, depth // 2, 3 * depth // 4),
        (count // 4, count // 8, count // 16),
        method=TextAttention(heads=4),
        budget=functools.partial(Adaptive, lambda_=1.0),
    )
