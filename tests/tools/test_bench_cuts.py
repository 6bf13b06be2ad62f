"""The prefill bench runs and counts right; how fast it is, is not a test's business."""

import pytest

from meteor_jax.models.llama import LlamaConfig
from meteor_jax.tools.bench_cuts import compare


@pytest.mark.long
def test_an_adaptive_budget_computes_about_what_a_fixed_one_of_its_mean_does():
    config = LlamaConfig(
        depth=4, width=32, num_heads=2, num_kv_heads=2, mlp_dim=32, vocab_size=50, init_std=0.3
    )
    timings = compare(
        config, layers=(1, 2), keep=(24, 12), batch=8, num_visual=64, num_text=6, repeats=1
    )
    by_name = {timing.name: timing for timing in timings}
    assert by_name["full"].kept == by_name["before"].kept == ()
    assert by_name["fixed"].kept == by_name["fixed"].computed == (24, 12)
    for kept, computed, mean in zip(
        by_name["adaptive"].kept, by_name["adaptive"].computed, (24, 12), strict=True
    ):
        assert kept == pytest.approx(mean, rel=0.02)
        assert kept < computed < 1.12 * kept
    assert all(timing.median_s > 0 and timing.compile_s > 0 for timing in timings)
