"""Parameters of pruning methods that have their own."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from meteor_jax.pruning.method import Method


class MethodParams(nn.Module):
    """Parameters of the learned pruning methods, by name."""

    methods: tuple[Method, ...]
    widths: tuple[tuple[str, int], ...]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        widths = dict(self.widths)
        return {
            method.name: self.param(
                method.name, lambda key, m=method: m.init_params(key, widths=widths)
            )
            for method in self.methods
        }
