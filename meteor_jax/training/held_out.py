"""The loss on examples that training never sees."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meteor_jax.models.family import Family
from meteor_jax.parallel.rules import shard_batch
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Array, Batch

Sums = tuple[Array, Array]  # of the loss and of its targets


class HeldOutLoss:
    """`held_out/loss/<plan>`: the loss, mean over the targets of fixed batches.

    Args:
        plans: by name, as trained.
        batches: this process's rows, NumPy arrays; the same every time.
    """

    def __init__(
        self, model: Family, plans: Mapping[str, PrunePlan], batches: Sequence[Batch], mesh: Mesh
    ) -> None:
        self._batches, self._mesh = batches, mesh

        def add(params: Any, total: Sums, batch: Batch, *, plan: PrunePlan) -> Sums:
            sums = model.loss(params, batch, plan=plan, rng=jax.random.PRNGKey(0))
            return total[0] + sums.loss, total[1] + sums.count

        self._add = {
            name: jax.jit(functools.partial(add, plan=plan)) for name, plan in plans.items()
        }

    def __call__(self, params: Any) -> dict[str, float]:
        """The losses with `params`, which are on the mesh."""
        losses = {}
        for name, add in self._add.items():
            total = (np.zeros((), np.float32),) * 2
            for batch in self._batches:
                # One batch at a time, or all of them would wait on the device.
                total = jax.block_until_ready(add(params, total, shard_batch(batch, self._mesh)))
            losses[f"held_out/loss/{name}"] = float(total[0]) / max(float(total[1]), 1.0)
        return losses
