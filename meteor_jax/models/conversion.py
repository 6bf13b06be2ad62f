"""The words in which models say how their checkpoints are converted; `convert/` is the engine.

A `Table` has one `Rule` for each tensor: its name, the path of our parameter, and an invertible
transform. `{i}` in a name stands for the layer, whose parameters are rows of one stacked array
here. The same table serves both directions. A `Format` renames another layout to the table's names.
Each encoder and decoder has a `conversion.py` with its tables; a family joins them in a
`Conversion`.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from meteor_jax.config import ConfigError

Array = np.ndarray
Shape = tuple[int, ...]
Fields = dict[str, Any]  # of a config dataclass
HEAD_DIM = 64  # of every large vision transformer here


class ConversionError(ConfigError):
    """A checkpoint that cannot be converted; `problems` has one line for each thing wrong."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = f"{len(problems)} problems:\n  " if len(problems) > 1 else ""
        super().__init__(count + "\n  ".join(problems))


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
    """A convolution whose stride is its size, as a dense layer on `models.layers.resize.patchify`:
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
        whole: the tensor's shape if the parameter is only a slice; it cannot be exported then.
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
        """Every tensor's name, and its row of the parameter (None: all rows)."""
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


def one_way(load: Callable[[Array], Array]) -> Transform:
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


@dataclasses.dataclass(frozen=True)
class Format:
    """One way in which others store a model.

    Attributes:
        part: what it holds: the name of an encoder or decoder, or another that the family's
            `Conversion` knows.
        model_types: `model_type` in a config.json of this format.
        mark: a regular expression; a tensor whose name it matches betrays the format.
        renames: (regular expression for a whole name, the table's name); the first match counts.
        ignored: (regular expression for a whole name, why the tensor is left out).
    """

    part: str
    mark: str
    renames: tuple[tuple[str, str], ...]
    ignored: tuple[tuple[str, str], ...] = ()
    model_types: tuple[str, ...] = ()

    def under(self, prefix: str) -> Format:
        """The same format of a part whose names in the table begin with `prefix`."""
        renames = tuple((pattern, prefix + name) for pattern, name in self.renames)
        return dataclasses.replace(self, renames=renames)


class Shapes:
    """Shapes by name; what is absent is None, and so is every size that needs it."""

    def __init__(self, shapes: Mapping[str, Shape], prefix: str = ""):
        self._shapes = {
            name.removeprefix(prefix): shape
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }

    def size(self, name: str, axis: int = 0) -> int | None:
        shape = self._shapes.get(name, ())
        return shape[axis] if -len(shape) <= axis < len(shape) else None

    def first(self, pattern: str, axis: int = 0) -> int | None:
        """The size in the first tensor whose whole name matches."""
        return next(iter(self.sizes(pattern, axis)), None)

    def sizes(self, pattern: str, axis: int = 0) -> list[int]:
        """The size in every tensor whose whole name matches."""
        found = (self.size(name, axis) for name in self._shapes if re.fullmatch(pattern, name))
        return [size for size in found if size is not None]

    def count(self, pattern: str) -> int | None:
        """One more than the largest number that `pattern` catches at the start of a name."""
        matches = (re.match(pattern, name) for name in self._shapes)
        return max((int(match[1]) + 1 for match in matches if match), default=None)

    def where(self, pattern: str, test: Callable[[Shape], bool]) -> tuple[int, ...]:
        """The numbers that `pattern` catches, of tensors whose shape passes."""
        matches = ((re.fullmatch(pattern, name), shape) for name, shape in self._shapes.items())
        return tuple(sorted({int(m[1]) for m, shape in matches if m and test(shape)}))


def known(fields: Fields) -> Fields:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def heads(width: int | None) -> int | None:
    """Attention heads of a vision transformer where nothing tells."""
    return width and max(width // HEAD_DIM, 1)


def vision_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a Hugging Face config.json says of the vision tower."""
    return config.get("vision_config") or config


def check_activation(config: Mapping[str, Any], expected: str) -> None:
    """Raises ConversionError where a config.json names another activation."""
    activation = config.get("hidden_act", expected)
    if activation != expected:
        raise ConversionError(
            [f"config.json: expected hidden_act={expected!r}, got {activation!r}."]
        )


def _nothing_stated(config: Mapping[str, Any]) -> Fields:
    return {}


@dataclasses.dataclass(frozen=True)
class PartConversion:
    """The conversion of one encoder or decoder.

    Attributes:
        formats: by name, the layouts in which others store it alone.
        table: from its config to its table.
        sizes: from its tensors' shapes to fields of its config; None where they do not tell.
        stated: from its own config.json to fields that the shapes do not show.
    """

    formats: Mapping[str, Format]
    table: Callable[[Any], Table]
    sizes: Callable[[Shapes], Fields]
    stated: Callable[[Mapping[str, Any]], Fields] = _nothing_stated


class Conversion(abc.ABC):
    """What the engine in `convert/` asks of a family.

    Attributes:
        whole: the `Format.part` of a checkpoint that holds the whole model.
    """

    whole: str

    @property
    @abc.abstractmethod
    def formats(self) -> Mapping[str, Format]:
        """By name, the layouts that it reads."""

    @abc.abstractmethod
    def fields(
        self, part: str, *, shapes: Mapping[str, Shape], config: Mapping[str, Any]
    ) -> Fields:
        """Fields of the family's config for what a checkpoint holds.

        Args:
            part: as in `Format.part`.
            shapes: of the tensors, under the table's names.
            config: the checkpoint's config.json, or nothing.

        Raises:
            ConversionError: where config.json asks for what the model cannot do.
        """

    @abc.abstractmethod
    def table(self, config: Any, parts: Sequence[str]) -> Table:
        """The rules of some top-level parameters."""

    @abc.abstractmethod
    def param_shapes(self, config: Any, parts: Sequence[str]) -> dict[str, Shape]:
        """Shapes of some top-level parameters, by path; nothing is computed."""

    def parts(self, config: Any, part: str) -> tuple[str, ...]:
        """The top-level parameters that a checkpoint of `part` fills."""
        return (part,)

    def split_projector(self, part: str, fields: Fields) -> Fields:
        """`fields` with a projector for each encoder, made of the checkpoint's single one."""
        raise ConfigError(f"--split_projector: a checkpoint of '{part}' has no projector to split.")

    def rename_encoder(self, part: str, fields: Fields, *, name: str) -> Fields:
        """`fields` of an encoder that comes alone, under another name in the model."""
        raise ConfigError(f"--name: a checkpoint of '{part}' is not an encoder alone.")

    def part_of(self, config: Any, name: str) -> tuple[str, str]:
        """A tensor's part of the model and its name in it, for the report."""
        return "", name

    def config_json(self, config: Any, *, part: str, source: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of an exported checkpoint.

        Args:
            part: that was converted, "" where it was trained here.
            source: its config.json, or nothing.
        """
        return dict(source) or dataclasses.asdict(config)


def flat_shapes(init: Callable[..., Any], *args: Any) -> dict[str, Shape]:
    """By path, the shapes of what `init(key, *args)` makes, a Linen module's variables."""
    params = jax.eval_shape(init, jax.random.key(0), *args)["params"]
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}
