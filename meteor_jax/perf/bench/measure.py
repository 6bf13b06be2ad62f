"""What pruning saves, measured: plans against one another, with the same weights, in one run.

Times an image and a question to the end of the answer: encode (encoders, projectors, fusion),
prefill (up to the first token), decode. The weights are random and made on the device. The plans
are interleaved, so that a slow moment of the machine falls on all; medians, with the fastest and
the slowest. Compile time is apart. A plan that prunes inside the encoders runs in METEOR's form of
the model (a projector an encoder), the others in the form that the config has.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from meteor_jax.data import pipeline
from meteor_jax.data.tokenizers import load_tokenizer
from meteor_jax.experiment.config import Experiment, Stage
from meteor_jax.inference.engine.data_shards import DataShards
from meteor_jax.inference.layout import inference_mesh, param_dtype
from meteor_jax.parallel.chips import find_chip
from meteor_jax.parallel.distributed import DataShard
from meteor_jax.parallel.mesh import check_batch_size, make_mesh
from meteor_jax.perf.bench.programs import (
    Inference,
    Programs,
    compile_inference,
    compile_train,
    form_of,
    make_inputs,
    make_params,
    train_states,
)
from meteor_jax.perf.bench.table import Row
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.training.data import TrainingData


def bench(
    experiment: Experiment,
    *,
    plans: Sequence[PrunePlan],
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 5,
    new_tokens: int = 16,
    text_tokens: int = 64,
    train: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> list[Row]:
    """One row a batch size and plan, in this order.

    The programs are those of evaluation, on `inference_mesh` over `devices` (default: all) and with
    its parameters; batch sizes are rounded up to as many rows for each of its shards. The training
    step is training's: float32 parameters on `train.mesh`.

    Seconds are medians over `repeats`; "spread" holds [fastest, slowest] of each. `tokens` is the
    mean over the decoder's layers of an image's tokens, as measured; `tflops` those of one row up
    to the first token; `peak_bytes` what the plan's hungriest program needs, parameters included,
    as its compiler laid it out, and `process_peak_bytes` what the whole process has needed so
    far, all plans. Shares of the chip's peak are None where the chip is not known.

    Raises:
        ValueError: if a plan does not fit the model.
    """
    forms = {plan.name: form_of(experiment.model, plan) for plan in plans}
    mesh, dtype = inference_mesh(experiment, devices=devices), param_dtype(experiment)
    train_mesh = make_mesh(experiment.train.mesh, devices=devices) if train else None
    with jax.set_mesh(mesh):
        params = make_params(forms.values(), dtype=dtype, mesh=mesh)
    stage, rows, shards = experiment.train.finetune, [], DataShards(mesh).count
    for batch in dict.fromkeys(math.ceil(size / shards) * shards for size in batch_sizes):
        sizes = {"batch": batch, "text_tokens": text_tokens}
        with jax.set_mesh(mesh):
            inputs = make_inputs(experiment.model, **sizes, mesh=mesh)
            compiled = {
                plan.name: compile_inference(
                    forms[plan.name],
                    params[forms[plan.name].fusion],
                    inputs,
                    plan=plan,
                    new_tokens=new_tokens,
                )
                for plan in plans
            }
            runs = {name: one.run for name, one in compiled.items()}
            seconds = interleave(runs, repeats=repeats)
        found = {
            name: {"plan": name, "batch": batch}
            | _inference_row(
                one, seconds[name], batch=batch, new_tokens=new_tokens, num_devices=mesh.size
            )
            for name, one in compiled.items()
        }
        if train_mesh is not None:
            check_batch_size(batch, train_mesh, where="batch_sizes")
            with jax.set_mesh(train_mesh):
                inputs = make_inputs(experiment.model, **sizes, mesh=train_mesh)
                states = train_states(forms.values(), stage=stage, mesh=train_mesh)
                steps = {
                    plan.name: compile_train(
                        forms[plan.name], states, inputs, plan=plan, stage=stage
                    )
                    for plan in plans
                }
                runs = {name: one.run for name, one in steps.items()}
                seconds = interleave(runs, repeats=repeats)
            for name, one in steps.items():
                row = _train_row(one, seconds[name], num_devices=mesh.size)
                row["spread"] |= found[name]["spread"]
                found[name] |= row
        peak, source = process_peak()
        common = {
            "process_peak_bytes": peak,
            "process_peak_source": source,
            "repeats": repeats,
            "new_tokens": new_tokens,
            "text_tokens": text_tokens,
            "mesh": dict(mesh.shape),
            "param_dtype": dtype,
            "versions": versions(),
        }
        rows += [row | common for row in found.values()]
    return rows


def interleave(
    runs: Mapping[str, Callable[[], dict[str, float]]], *, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """What each of `runs` returned each time; one of each, then the next of each, …"""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            results[name].append(run())
    return results


def _inference_row(
    one: Inference,
    runs: Sequence[Mapping[str, float]],
    *,
    batch: int,
    new_tokens: int,
    num_devices: int,
) -> Row:
    steps = new_tokens - 1
    measured = {
        "encode_s": [run["encode"] for run in runs],
        "prefill_s": [run["prefill"] for run in runs],
        "decode_s": [run["decode"] for run in runs],
        "decode_ms_per_token": [1e3 * run["decode"] / steps for run in runs],
        "end_to_end_s": [sum(run.values()) for run in runs],
    }
    row: Row = {name: statistics.median(values) for name, values in measured.items()}
    parts = dict(one.cost.rows)
    llm = parts["llm"]
    chip = find_chip(jax.devices()[0].device_kind)

    def share(amount: float, seconds: float, peak: str) -> float | None:
        return amount / seconds / getattr(chip, peak) if chip else None

    return row | {
        "examples_per_s": batch / row["end_to_end_s"],
        "peak_bytes": one.peak_bytes,
        "tokens": one.cost.visual_tokens_mean,
        "tflops": one.cost.total_flops / 1e12,
        "encode_mfu": share(
            batch * (one.cost.total_flops - llm) / num_devices, row["encode_s"], "flops_per_s"
        ),
        "prefill_mfu": share(batch * llm / num_devices, row["prefill_s"], "flops_per_s"),
        "decode_bandwidth": share(one.decode_bytes * steps, row["decode_s"], "bytes_per_s"),
        "compile_s": one.compile_s,
        "spread": {name: [min(values), max(values)] for name, values in measured.items()},
    }


def _train_row(one: Programs, runs: Sequence[Mapping[str, float]], *, num_devices: int) -> Row:
    seconds = [run["train"] for run in runs]
    chip, median = find_chip(jax.devices()[0].device_kind), statistics.median(seconds)
    return {
        "train_step_s": median,
        "train_tflops": one.flops / 1e12,
        "train_mfu": one.flops / median / num_devices / chip.flops_per_s if chip else None,
        "train_peak_bytes": one.peak_bytes,
        "train_compile_s": one.compile_s,
        "spread": {"train_step_s": [min(seconds), max(seconds)]},
    }


def process_peak() -> tuple[int, str]:
    """The most memory that was in use so far, and whose count it is: the device's where it has
    one, else the resident set of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident set"


def versions() -> dict[str, str]:
    """Software and hardware that the numbers belong to."""
    device = jax.devices()[0]
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return packages | {
        "python": platform.python_version(),
        "device": device.device_kind,
        "backend": device.platform,
        "processor": _processor(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def bench_data(experiment: Experiment, *, batch: int, batches: int = 32) -> float:
    """Examples a second of finetune's pipeline alone, after a first batch that opens it."""
    records = pipeline.open_sources(experiment.data)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(
            experiment.data.tokenizer,
            folder=Path(folder, "tokenizer"),
            texts=lambda: pipeline.training_texts(records),
        )
    config = dataclasses.replace(experiment.train.finetune, batch_size=batch, grad_accum_steps=1)
    iterator = TrainingData(experiment, tokenizer, records).batches(
        Stage("finetune", config, start=0, stop=1), first_batch=0, shard=DataShard()
    )
    next(iterator)
    started = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return batch * batches / (time.perf_counter() - started)
