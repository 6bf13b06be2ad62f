"""What a training step costs: the numerator of TFLOP/s and of MFU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax

from meteor_jax.models.flops import counted_forms, trace_flops


def train_step_flops(step: Callable[..., Any], *args: Any) -> float:
    """Operations of one step over a whole batch, on all devices together.

    Counted are the forward pass and the gradients that the step takes, over every row and every
    padded place. What rematerialisation computes again does not count, as in MFU's definition.
    Neither does the optimizer, which has no products.

    Args:
        step: jitted; traced once more here, in forms that can be counted.
        args: of the step, or their shapes; the batch of all processes.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
    with counted_forms():
        return trace_flops(inspect.unwrap(step), *shapes)[0].needed
