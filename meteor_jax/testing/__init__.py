"""A model, prompts and plans so small that a test compiles them in seconds; for your tests too.

plan = dummy_plan("fastv(layer=2, keep=7)")
forward = jax.jit(functools.partial(dummy_model().module.apply, plan=plan))
out = forward({"params": dummy_params()}, dummy_batch())
assert out.logits.shape == (3, 12, 50)
"""

from meteor_jax.testing.dummy import (
    DUMMY_CALIBRATION,
    DUMMY_PLANS,
    DummyTokenizer,
    dummy_batch,
    dummy_config,
    dummy_model,
    dummy_params,
    dummy_plan,
)

__all__ = [
    "DUMMY_CALIBRATION",
    "DUMMY_PLANS",
    "DummyTokenizer",
    "dummy_batch",
    "dummy_config",
    "dummy_model",
    "dummy_params",
    "dummy_plan",
]
