"""What a row says about time, and that counting it waits for nothing twice."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.training.logging import recorder as recording
from meteor_jax.training.logging.metrics import MetricsLog
from meteor_jax.training.logging.progress import ProgressBar
from meteor_jax.training.logging.recorder import CLOCK_FIELDS, StepRecorder


class Clock:
    """A clock that only moves when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(recording, "time", clock)
    return clock


@pytest.fixture
def recorder(tmp_path, clock):
    log, bar = MetricsLog(tmp_path, first_step=0), ProgressBar(total=10, first_step=0)
    with log, bar:
        yield StepRecorder(log, bar, peak_flops_per_s=8e12)


def add(recorder, clock, *, seconds, waited=0.5, tokens=30.0):
    """One step that ends `seconds` later. Its number is how many came before."""
    clock.now += seconds
    step = add.step = getattr(add, "step", -1) + 1
    recorder.add(
        {
            "loss": jnp.float32(1),
            "grad_norm": jnp.float32(1),
            "tokens": jnp.float32(tokens),
            "skipped_rows": jnp.int32(0),
        },
        row={
            "step": step,
            "stage": "finetune",
            "plan": "full",
            "examples": 4,
            "data_wait_s": waited,
        },
        example_id=np.arange(4),
        flops=2e12,
    )


def read(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_rates_and_percentiles(tmp_path, recorder, clock, monkeypatch):
    monkeypatch.setattr(recording, "STEPS_AHEAD", 0)  # a step is done when it is added
    for seconds in (1, 1, 2, 4):
        add(recorder, clock, seconds=seconds)
    recorder.flush()
    rows = read(tmp_path)
    assert [row["step_s"] for row in rows] == [1, 1, 2, 4]
    for row in rows:
        assert row["examples_per_s"] == 2
        assert row["tokens_per_s"] == 15
        assert row["data_wait_share"] == 0.25
        assert row["tflops_per_s"] == 1
        assert row["mfu"] == 0.125
        assert (row["step_s_p50"], row["step_s_p90"]) == (1.5, pytest.approx(3.4))
    assert set(CLOCK_FIELDS) <= rows[0].keys()


def test_what_is_measured_after_the_steps_is_not_their_time(tmp_path, recorder, clock):
    def measure():
        clock.now += 50
        return {"held_out/loss/full": 3.0}

    add(recorder, clock, seconds=1)
    recorder.flush(after=measure)
    add(recorder, clock, seconds=2)
    recorder.flush(after=None)
    first, second = read(tmp_path)
    assert (first["held_out/loss/full"], first["step_s"], second["step_s"]) == (3.0, 1, 2)
    assert "held_out/loss/full" not in second


def test_unknown_peak_gives_no_mfu(tmp_path, clock):
    with MetricsLog(tmp_path, first_step=0) as log, ProgressBar(total=1, first_step=0) as bar:
        recorder = StepRecorder(log, bar)
        add(recorder, clock, seconds=1)
        recorder.flush()
    assert "mfu" not in read(tmp_path)[0]
