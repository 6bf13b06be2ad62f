"""How every tensor of a PyTorch checkpoint becomes a parameter, and the way back.

One table a model, one row a tensor: its name in EAGLE's checkpoints, the path of our parameter,
and an invertible transform. `{i}` in a name stands for the layer, whose parameters are rows of one
stacked array here. The same table serves both directions; other formats are renamed to EAGLE's
names first (`formats.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Transform:
    """`load` makes a parameter of a tensor, `save` a tensor of a parameter; both only move
    numbers, so the round trip is exact."""

    load: Callable[[Array], Array]
    save: Callable[[Array], Array]


SAME = Transform(lambda tensor: tensor, lambda param: param)
LINEAR = Transform(np.transpose, np.transpose)  # [out, in] ↔ [in, out]
DEPTHWISE = Transform(  # [d, 1, y, x] ↔ [y, x, 1, d]
    lambda tensor: tensor.transpose(2, 3, 1, 0), lambda param: param.transpose(3, 2, 0, 1)
)
BATCH_OF_ONE = Transform(lambda tensor: tensor[0], lambda param: param[None])


def patches(patch: int) -> Transform:
    """A convolution whose stride is its size, as a dense layer on `models.resize.patchify`:
    [out, in, y, x] ↔ [y · x · in, out]."""

    def load(tensor: Array) -> Array:
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])

    def save(param: Array) -> Array:
        return param.reshape(patch, patch, -1, param.shape[-1]).transpose(3, 2, 0, 1)

    return Transform(load, save)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table.

    Attributes:
        source: the tensor's name, with `{i}` for the layer.
        target: the parameter's path, parts joined by "/".
        layers: the layers whose tensors are the rows of a stacked parameter, in its order; None
            where it is not stacked.
        unused_rows: leading rows of the tensor that the model drops.
        padding_rows: rows of zeros that the model has behind those of the tensor.
        fallbacks: names that hold the same numbers, used where `source` is absent.
        compute: makes the parameter where none of these names is there; the argument is the dtype
            of the weights around it.
        whole: the tensor's shape where the parameter is only a part of it, so that there is no
            way back.
    """

    source: str
    target: str
    transform: Transform = SAME
    layers: tuple[int, ...] | None = None
    unused_rows: int = 0
    padding_rows: int = 0
    fallbacks: tuple[str, ...] = ()
    compute: Callable[[np.dtype], Array] | None = None
    whole: tuple[int, ...] = ()

    def expand(self) -> list[tuple[str, int | None]]:
        """Every tensor's name, and its row of the parameter (None: all of it)."""
        if self.layers is None:
            return [(self.source, None)]
        return [(self.source.replace("{i}", str(i)), row) for row, i in enumerate(self.layers)]

    def source_shape(self, param_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor must have, from that of the whole parameter."""
        if self.whole:
            return self.whole
        shape = param_shape if self.layers is None else param_shape[1:]
        first, *rest = self.transform.save(np.broadcast_to(np.uint8(0), shape)).shape
        return (first + self.unused_rows - self.padding_rows, *rest)


@dataclasses.dataclass(frozen=True)
class Unused:
    """Tensors that a checkpoint may hold and the model has no parameter for.

    Attributes:
        pattern: a regular expression for the whole name.
        reason: why, for the report.
    """

    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """What is known of the tensors of one part of the model."""

    rules: tuple[Rule, ...]
    unused: tuple[Unused, ...] = ()

    def __add__(self, other: Table) -> Table:
        return Table(self.rules + other.rules, self.unused + other.unused)

    def under(self, *, source: str, target: str) -> Table:
        """The same table with all names inside `source` and all paths inside `target`."""
        rules = tuple(
            dataclasses.replace(
                rule,
                source=source + rule.source,
                target=f"{target}/{rule.target}",
                fallbacks=tuple(source + name for name in rule.fallbacks),
            )
            for rule in self.rules
        )
        escaped = source.replace(".", r"\.")
        unused = tuple(Unused(escaped + entry.pattern, entry.reason) for entry in self.unused)
        return Table(rules, unused)


def part(load: Callable[[Array], Array]) -> Transform:
    """A transform without a way back."""

    def save(param: Array) -> Array:
        raise ValueError("a split projector has no place in an EAGLE checkpoint.")

    return Transform(load, save)


def linear(source: str, target: str, *, bias: bool = True) -> list[Rule]:
    """A dense layer: weight [out, in] and, unless said otherwise, bias."""
    rules = [Rule(f"{source}.weight", f"{target}/kernel", LINEAR)]
    return [*rules, Rule(f"{source}.bias", f"{target}/bias")] if bias else rules


def convolution(source: str, target: str, *, patch: int, bias: bool = True) -> list[Rule]:
    """A convolution whose stride is its size."""
    rules = [Rule(f"{source}.weight", f"{target}/kernel", patches(patch))]
    return [*rules, Rule(f"{source}.bias", f"{target}/bias")] if bias else rules


def norm(source: str, target: str, *, bias: bool = True) -> list[Rule]:
    """A layer norm, or without bias an RMS norm."""
    rules = [Rule(f"{source}.weight", f"{target}/scale")]
    return [*rules, Rule(f"{source}.bias", f"{target}/bias")] if bias else rules


def stacked(
    rules: Iterable[Rule], *, source: str, target: str = "blocks/stack", layers: Iterable[int]
) -> list[Rule]:
    """The rules of one block, for all blocks: `source` holds the `{i}`."""
    return [
        dataclasses.replace(
            rule,
            source=f"{source}.{rule.source}",
            target=f"{target}/{rule.target}",
            layers=tuple(layers),
        )
        for rule in rules
    ]
