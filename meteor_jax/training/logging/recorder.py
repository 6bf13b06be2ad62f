"""The metrics of steps, fetched from the device without a step that waits for the host."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from meteor_jax.training.logging.metrics import MetricsLog
from meteor_jax.training.logging.progress import ProgressBar

# What a row says about time, and so differs from run to run.
CLOCK_FIELDS = (
    "examples_per_s",
    "tokens_per_s",
    "tflops_per_s",
    "mfu",
    "data_wait_s",
    "data_wait_share",
    "step_s",
    "step_s_p50",
    "step_s_p90",
    "step_s_p99",
)
MOST_SKIPPED = 64  # examples one after the other: it is the settings then, not a few bad files
STEPS_AHEAD = 2  # steps that may wait on the device: enough to keep it busy, few enough to hold


class TrainingFailed(RuntimeError):
    """The loss is NaN or infinite, or every example was skipped. The message is one line."""


@dataclasses.dataclass
class _Pending:
    """A step whose metrics are still on the device; `done`: when they were seen finished."""

    row: dict[str, Any]
    metrics: dict[str, jax.Array]
    example_id: np.ndarray
    flops: float
    done: float = 0.0

    def wait(self) -> None:
        if not self.done:
            jax.block_until_ready(self.metrics)
            self.done = time.perf_counter()


class StepRecorder:
    """Keeps metrics on the device until `flush`, so that no step waits for the host.

    Args:
        peak_flops_per_s: of all devices together; None where it is not known.
    """

    def __init__(
        self, log: MetricsLog, bar: ProgressBar, *, peak_flops_per_s: float | None = None
    ) -> None:
        self._log = log
        self._bar = bar
        self._peak = peak_flops_per_s
        self._pending: list[_Pending] = []
        self._since = time.perf_counter()
        self._skipped_in_a_row = 0
        self.num_skipped = 0

    def add(
        self,
        metrics: dict[str, jax.Array],
        *,
        row: dict[str, Any],
        example_id: np.ndarray,
        flops: float,
    ) -> None:
        """Takes in one step.

        Args:
            row: what the host knows of it (step, stage, plan, examples, data_wait_s).
            example_id: int32[B] of this process's rows.
            flops: operations of the step, on all devices.
        """
        self._pending.append(_Pending(row, metrics, example_id, flops))
        if len(self._pending) > STEPS_AHEAD:
            self._pending[-1 - STEPS_AHEAD].wait()

    def flush(self, after: Callable[[], Mapping[str, float]] | None = None) -> None:
        """Fetches and writes what is pending; rates and shares are over those steps.

        Args:
            after: called when they are done; what it measures joins the row of the last one, and
                the time that it takes is not theirs.

        Raises:
            TrainingFailed: naming the first step whose loss or gradient is not finite, and its
                examples; or where all of many examples were skipped.
        """
        if not self._pending:
            return
        for pending in self._pending:
            pending.wait()
        fetched = jax.device_get([pending.metrics for pending in self._pending])
        tokens = sum(float(metrics["tokens"]) for metrics in fetched)
        rates, step_s = self._rates(tokens=tokens)
        rows: list[dict[str, Any]] = [
            pending.row | {k: value.item() for k, value in metrics.items()} | {"step_s": s} | rates
            for pending, metrics, s in zip(self._pending, fetched, step_s, strict=True)
        ]
        failed = [
            i for i, row in enumerate(rows) if not math.isfinite(row["loss"] + row["grad_norm"])
        ]
        if failed:
            # JSON has no NaN: the failed step is in the message instead.
            self._log.write_steps(rows[: failed[0]])
            raise _failure(rows[failed[0]], self._pending[failed[0]].example_id)
        if after is not None:
            rows[-1] |= after()
        self._log.write_steps(rows)
        self._pending.clear()
        self._count_skipped(rows)
        self._bar.show(
            rows[-1]["stage"],
            step=rows[-1]["step"] + 1,
            loss=rows[-1]["loss"],
            examples_per_s=rates["examples_per_s"],
        )
        self.restart_clock()

    def _count_skipped(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            skipped = row["skipped_rows"]
            self.num_skipped += skipped
            all_of_it = skipped >= row["examples"]
            self._skipped_in_a_row = self._skipped_in_a_row + skipped if all_of_it else 0
            if self._skipped_in_a_row >= MOST_SKIPPED:
                raise TrainingFailed(
                    f"the last {self._skipped_in_a_row} examples, up to step {row['step']}, were "
                    "all skipped, so that nothing is learnt; each is named above with its reason: "
                    "raise data.text_length, or look at the files."
                )

    def restart_clock(self) -> None:
        """Leaves out of the rates what happened since the last step."""
        self._since = time.perf_counter()

    def _rates(self, *, tokens: float) -> tuple[dict[str, float], list[float]]:
        """What is true of the pending steps together, and the seconds that each took."""
        done = [self._since, *(pending.done for pending in self._pending)]
        step_s, seconds = np.diff(done), done[-1] - done[0]
        waited = sum(pending.row["data_wait_s"] for pending in self._pending)
        rates = {
            "examples_per_s": sum(pending.row["examples"] for pending in self._pending) / seconds,
            "tokens_per_s": tokens / seconds,
            "data_wait_share": waited / seconds,
        }
        flops_per_s = sum(pending.flops for pending in self._pending) / seconds
        rates["tflops_per_s"] = flops_per_s / 1e12
        if self._peak:
            rates["mfu"] = flops_per_s / self._peak
        for share in (50, 90, 99):
            rates[f"step_s_p{share}"] = float(np.percentile(step_s, share))
        return rates, step_s.tolist()


def _failure(row: Mapping[str, Any], example_id: np.ndarray) -> TrainingFailed:
    if jax.process_count() > 1:  # every process is here, for all have the same loss
        example_id = multihost_utils.process_allgather(example_id, tiled=True)
    examples = ", ".join(map(str, dict.fromkeys(example_id.tolist())))
    return TrainingFailed(
        f"loss is {row['loss']:.4g} at step {row['step']}, its gradient's norm "
        f"{row['grad_norm']:.4g} (stage {row['stage']}, plan {row['plan']}, learning rate "
        f"{row['learning_rate']:.3g}; examples {examples}): lower the learning rate, or look at "
        "these examples; the last checkpoint is from before."
    )
