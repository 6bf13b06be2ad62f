"""Every part of a model against the same part in PyTorch, on the same machine, in one run.

Needs torch and transformers. Sizes are the config's, weights random, attention PyTorch's own
(`scaled_dot_product_attention`). Models are transformers' where it has them (CLIP, ConvNeXt,
Pix2Struct, LLaMA); EVA-02 and the projector are written out in `torch_models`. Both sides
start from float images of the encoder's own size, and take turns; medians, fastest and slowest.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from meteor_jax.config import ConfigError
from meteor_jax.models.eagle.model import Meteor, MeteorConfig
from meteor_jax.models.eagle.projector import Projector
from meteor_jax.models.encoders.registry import ENCODERS
from meteor_jax.models.family import ModelConfig
from meteor_jax.perf.bench import torch_models as theirs_of
from meteor_jax.perf.bench.measure import interleave, versions
from meteor_jax.perf.bench.programs import (
    Compiler,
    compile_generation,
    make_inputs,
    make_params,
)
from meteor_jax.pruning.methods.full import full
from meteor_jax.types import Array, VisualTokens

Run = Callable[[], dict[str, float]]
DTYPES = ("float32", "bfloat16")


def bench_torch(
    config: ModelConfig, *, dtype: str, repeats: int, text_tokens: int = 64, new_tokens: int = 16
) -> list[dict[str, Any]]:
    """A row a part: seconds of ours and of torch's, and their ratio; a decoded token is one step
    of `new_tokens − 1`.

    Raises:
        ConfigError: for a model of another family than "eagle".
    """
    if not isinstance(config, MeteorConfig):
        raise ConfigError(f"bench-torch: expected a model of 'eagle', got '{config.family}'.")
    model: Any = dataclasses.replace(config, dtype=dtype, fusion="pre")
    rows = []
    parts = (*model.encoders, "projector", "llm")
    for part in parts:
        if part == "llm":
            sizes = {"num_visual": model.grid**2, "text_tokens": text_tokens}
            ours = _our_llm(model, **sizes, new_tokens=new_tokens)
            theirs = theirs_of.llm(model, **sizes, new_tokens=new_tokens, dtype=dtype)
        elif part == "projector":
            ours = _our_projector(model)
            theirs = theirs_of.projector(model, dtype=dtype)
        else:
            ours = _our_encoder(model, part)
            theirs = theirs_of.encoder(model, part, dtype=dtype)
        runs = {"ours": _timed(ours), "torch": _timed(theirs)}
        for run in runs.values():
            run()
        seconds = interleave(runs, repeats=repeats)
        rows += [_row(name, dtype, seconds) for name in seconds["ours"][0]]
    return [row | {"versions": _versions()} for row in rows]


def _timed(steps: dict[str, Callable[[], Any]]) -> Run:
    """Runs the steps one after the other, and times each."""

    def run() -> dict[str, float]:
        seconds = {}
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name] = time.perf_counter() - started
        return seconds

    return run


def _row(name: str, dtype: str, seconds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"part": name, "dtype": dtype, "spread": {}}
    for side, runs in seconds.items():
        values = [run[name] for run in runs]
        row[f"{side}_s"] = statistics.median(values)
        row["spread"][f"{side}_s"] = [min(values), max(values)]
    return row | {"ratio": row["ours_s"] / row["torch_s"]}


def _our_encoder(model: MeteorConfig, name: str) -> dict[str, Callable[[], Any]]:
    config = model.encoder(name)
    module = ENCODERS[config.type].module(config, jnp.dtype(model.dtype))
    images = _noise((1, config.image_size, config.image_size, 3), model.dtype)
    return {name: _applied(module, images, read=lambda output: output.x)}


def _our_projector(model: MeteorConfig) -> dict[str, Callable[[], Any]]:
    module = Projector(model.llama.width, jnp.dtype(model.dtype))
    width = sum(model.encoder(name).width for name in model.encoders)
    x = _noise((1, model.grid**2, width), model.dtype)
    return {"projector": _applied(module, x, read=lambda output: output)}


def _applied(module: Any, x: Array, *, read: Callable[[Any], Array]) -> Callable[[], Array]:
    init = jax.jit(lambda key: _cast(module.init(key, x), x.dtype))
    variables = init(jax.random.key(0))
    apply = jax.jit(lambda variables, x: read(module.apply(variables, x)))
    return lambda: apply(variables, x).block_until_ready()


def _our_llm(
    model: MeteorConfig, *, num_visual: int, text_tokens: int, new_tokens: int
) -> dict[str, Callable[[], Any]]:
    params = {"llama": jax.jit(lambda: make_params([model], dtype=model.dtype)["pre"]["llama"])()}
    inputs = make_inputs(model, batch=1, text_tokens=text_tokens).replace(images=None)
    place = jnp.arange(num_visual, dtype=jnp.int32)[None, None]
    x = _noise((1, 1, num_visual, model.llama.width), model.dtype)
    visual = VisualTokens(x, jnp.zeros_like(place), place, place, span=num_visual)
    meteor = Meteor(model)
    generation = compile_generation(
        Compiler(), meteor, params, visual, inputs, plan=full(), new_tokens=new_tokens
    )
    made: dict[str, Any] = {}

    def run_prefill() -> None:
        made["prompt"] = jax.block_until_ready(generation.start())

    def run_decode() -> None:
        jax.block_until_ready(generation.decode(made.pop("prompt")))

    return {"llm prefill": run_prefill, f"llm decode, {new_tokens - 1} steps": run_decode}


def _noise(shape: tuple[int, ...], dtype: str) -> Array:
    return jax.random.normal(jax.random.key(0), shape).astype(dtype)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@functools.cache
def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return versions() | packages
