"""The loss on examples that training never sees."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from meteor_jax.parallel.rules import shard_batch
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.training.loss import TokenLoss, batch_loss
from meteor_jax.types import Batch


class HeldOutLoss:
    """`held_out/loss/<plan>`: cross-entropy, mean over the supervised tokens of fixed batches.

    Args:
        plans: by name, as trained.
        batches: this process's rows, NumPy arrays; the same every time.
    """

    def __init__(
        self, model: nn.Module, plans: Mapping[str, PrunePlan], batches: Sequence[Batch], mesh: Mesh
    ) -> None:
        self._batches, self._mesh = batches, mesh

        def add(params: Any, total: TokenLoss, batch: Batch, *, plan: PrunePlan) -> TokenLoss:
            sums, _ = batch_loss(model, params, batch, plan=plan, rng=jax.random.PRNGKey(0))
            return jax.tree.map(jnp.add, total, sums)

        self._add = {
            name: jax.jit(functools.partial(add, plan=plan)) for name, plan in plans.items()
        }

    def __call__(self, params: Any) -> dict[str, float]:
        """The losses with `params`, which lie on the mesh."""
        losses = {}
        for name, add in self._add.items():
            total = TokenLoss(*(np.zeros((), np.float32),) * 3)
            for batch in self._batches:
                # One batch at a time, or all of them would wait on the device.
                total = jax.block_until_ready(add(params, total, shard_batch(batch, self._mesh)))
            losses[f"held_out/loss/{name}"] = float(total.loss) / max(float(total.count), 1.0)
        return losses
