"""The prefill bench runs and counts right; how fast it is, is not a test's business."""

import pytest

from meteor_jax.models.llama import LlamaConfig
from meteor_jax.tools.bench_cuts import bench_prefill, bucket_plans


@pytest.mark.long
def test_buckets_are_what_their_names_say_and_adaptive_differs_between_examples():
    config = LlamaConfig(
        depth=4, width=32, num_heads=2, num_kv_heads=2, mlp_dim=32, vocab_size=50, init_std=0.3
    )
    timings = bench_prefill(
        config, plans=bucket_plans(depth=4, num_visual=64, scale=10.0), batch=3, num_visual=64,
        num_text=6, repeats=1,
    )
    kept = {timing.name: timing.num_kept for timing in timings}
    assert kept["full"] == []
    assert kept["smallest bucket"] == [[8] * 3, [4] * 3, [2] * 3]
    assert kept["largest bucket"] == [[32] * 3, [16] * 3, [8] * 3]
    assert all(timing.median_s > 0 and timing.compile_s > 0 for timing in timings)
    assert len(set(kept["adaptive"][0])) > 1
