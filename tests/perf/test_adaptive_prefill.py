"""The bench of rows of unequal length runs and counts right; how fast it is, is not a test's
business."""

import pytest

from meteor_jax.cli.__main__ import main
from meteor_jax.models.decoders.llama.model import LlamaConfig
from meteor_jax.perf.bench.adaptive_prefill import (
    Decoder,
    bench_rows,
    spread_kept,
    temporaries,
    three_steps,
)

CONFIG = LlamaConfig(
    depth=4, width=64, num_heads=2, num_kv_heads=2, mlp_dim=96, vocab_size=50, init_std=0.3
)


def test_rows_of_unequal_length_compute_about_their_mean():
    decoder = Decoder.make(CONFIG, num_visual=64, num_text=6)
    timings = {t.name: t for t in bench_rows(decoder, mean=24, start=2, batch=8, repeats=1)}
    assert spread_kept(24, batch=8).mean(1) == pytest.approx(24, abs=0.5)
    assert timings["fixed"].computed == 24 and timings["padded"].computed == 36
    assert 24 <= timings["adaptive"].computed < 1.15 * 24
    assert all(timing.median_s > 0 and timing.compile_s > 0 for timing in timings.values())


def test_steps_need_no_copy_of_the_parameters():
    """Those of a layer are as large as a row here, so that a copy of some would show."""
    decoder = Decoder.make(
        LlamaConfig(depth=8, width=256, num_heads=4, num_kv_heads=4, mlp_dim=704, vocab_size=50),
        num_visual=64,
        num_text=8,
    )
    full = temporaries(decoder, steps=(), batch=2)
    assert temporaries(decoder, steps=three_steps(decoder), batch=2) < 1.25 * full


@pytest.mark.parametrize("flag", ["width=100", "batch_size=5", "repeats=0", "depth=3"])
def test_sizes_that_cannot_be_are_one_line(flag, capsys):
    assert main(["bench-adaptive-prefill", f"--{flag}"]) == 2
    said = capsys.readouterr().err
    assert flag.partition("=")[0] in said and said.count("\n") == 1
