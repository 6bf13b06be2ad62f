"""What training, evaluation, inference and perf need of a model, whatever its family.

A family is a folder `models/<family>/` whose `family.py` registers a `Family`. A config names it,
`config.model.family = "eagle"`; a config file that imports a module with another one can name that.
`build_model(config.model)` is the only way from a config to a model outside `models/`.

B rows, M images of a row, T text tokens.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp

from meteor_jax.config import ConfigError, suggest
from meteor_jax.models.conversion import Conversion
from meteor_jax.models.flops import Cost, counted_forms, trace_flops
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Array, Batch

# (pattern for a parameter's path, mesh axis of each of its last dimensions); see `parallel.rules`.
ShardingRules = tuple[tuple[str, tuple[str | None, ...]], ...]


class Mean(flax.struct.PyTreeNode):
    """A mean of which parts of a batch hold parts: `total` / `count`, float32[] both."""

    total: Array
    count: Array


class LossSums(flax.struct.PyTreeNode):
    """Sums over some rows, float32[] each.

    Attributes:
        loss: over `count` targets: tokens, or rows of a classifier.
        correct: targets that the model would have predicted.
        tokens: entries that the largest part of the model computed, for throughput.
        means: further metrics by name.
    """

    loss: Array
    correct: Array
    count: Array
    tokens: Array
    means: dict[str, Mean] = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of every family's config, a frozen dataclass with at least these fields.

    Attributes:
        family: the name that the family is registered under.
        image_size: side of the images that the model takes.
        dtype: of the computation; parameters are float32.
    """

    family: str
    image_size: int
    dtype: Literal["float32", "bfloat16"]

    @classmethod
    def class_for(cls, values: Mapping[str, Any], *, where: str) -> type:
        """The class to build from the fields `values`; see `config.build`."""
        if cls is not ModelConfig:
            return cls
        try:
            return get_family(values.get("family", DEFAULT)).config_class
        except ConfigError as error:
            raise ConfigError(f"{where}.family: {error}") from error


@dataclasses.dataclass(frozen=True)
class Family(abc.ABC):
    """One model of a family, known by its config; equal configs are equal models.

    Attributes:
        config_class: a subclass of `ModelConfig`.
        conversion: how checkpoints of others are read; None where none are.
        output: what comes out. "text": the module has `encode_images`, `prefill` and `extend`, as
            `Meteor` has; "probabilities": `predict` gives one for each of `classes`.
        tokenizer_part: the top-level parameters that a tokenizer belongs to, if one does.
    """

    config: Any

    config_class: ClassVar[type]
    conversion: ClassVar[Conversion | None] = None
    output: ClassVar[Literal["text", "probabilities"]] = "text"
    tokenizer_part: ClassVar[str | None] = None

    @property
    @abc.abstractmethod
    def module(self) -> Any:
        """The Linen module; its call takes (batch, plan=plan) and makes every parameter."""

    @abc.abstractmethod
    def loss(self, params: Any, batch: Batch, *, plan: PrunePlan, rng: Array) -> LossSums:
        """The loss of a forward pass over `batch`, and what it counted."""

    @abc.abstractmethod
    def num_targets(self, batch: Batch) -> Array:
        """int32[]: `LossSums.count` of a batch, before anything is computed."""

    @classmethod
    def required_conversion(cls) -> Conversion:
        """`conversion`; ConfigError where there is none."""
        if cls.conversion is None:
            raise ConfigError(f"{cls.__name__} has no conversion; set `conversion` in the family.")
        return cls.conversion

    @property
    def sharding_rules(self) -> ShardingRules:
        """Rules for parameters that `parallel.rules` has no generic rule for."""
        return ()

    @property
    def parts(self) -> Mapping[str, Any]:
        """By name, the parts that have a config of their own; their parameters have that path."""
        return {}

    def shared_fields(self, parts: Collection[str] | None) -> tuple[str, ...]:
        """Fields outside `parts` on which the meaning of the parameters depends.

        Args:
            parts: of the model, those that are taken from another; None takes it whole.
        """
        own = (field.name for field in dataclasses.fields(self.config))
        return tuple(name for name in own if name != "dtype" and name not in self.parts)

    def inputs_spec(
        self, rows: int, *, text_length: int = 8, max_images: int = 1, segments: bool = False
    ) -> Batch:
        """A batch as ShapeDtypeStructs; init, training, tests and the AOT compiler share it.

        Args:
            segments: whether questions of one row do not see each other.
        """
        size = self.config.image_size

        def struct(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, *shape), dtype)

        return Batch(
            images=struct(jnp.uint8, max_images, size, size, 3),
            image_valid=struct(jnp.bool_, max_images),
            tokens=struct(jnp.int32, text_length),
            text_valid=struct(jnp.bool_, text_length),
            labels=struct(jnp.int32, text_length),
            example_id=struct(jnp.int32),
            segment_ids=struct(jnp.int32, text_length) if segments else None,
        )

    def init_params(self, batch: Batch, *, seed: int) -> dict[str, Any]:
        """Fresh parameters for batches shaped like `batch`; the tree is the same for any plan."""
        key = jax.random.PRNGKey(seed)
        return self.module.init(key, batch, plan=PrunePlan())["params"]

    def check_data(self, *, vocabulary: int, classes: Sequence[str]) -> None:  # noqa: B027
        """Raises ConfigError if the model has no place for so many tokens, or for these classes."""

    def encode(self, params: Any, images: Array, *, plan: PrunePlan) -> Any:
        """With "probabilities": what `predict` needs of uint8[I, H, W, 3], a pytree [I, ...]."""
        raise NotImplementedError

    def predict(
        self,
        params: Any,
        visual: Any,
        *,
        image_valid: Array,
        tokens: Array,
        text_valid: Array,
        plan: PrunePlan,
    ) -> Array:
        """With "probabilities": float32[B, C], one for each class, of prompts.

        Shapes:
            visual: pytree [B, M, ...] of `encode`; image_valid: bool[B, M].
            tokens: int32[B, T], padded on the right; text_valid: bool[B, T].
        """
        raise NotImplementedError

    def predict_batch(self, params: Any, batch: Batch, *, plan: PrunePlan) -> Array:
        """`encode` and `predict` of a whole batch."""
        shape = batch.image_valid.shape
        flat = batch.images.reshape(-1, *batch.images.shape[2:])
        visual = jax.tree.map(
            lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]),
            self.encode(params, flat, plan=plan),
        )
        return self.predict(
            params,
            visual,
            image_valid=batch.image_valid,
            tokens=batch.tokens,
            text_valid=batch.text_valid,
            plan=plan,
        )

    def count_cost(
        self,
        plan: PrunePlan,
        *,
        text_tokens: int = 1,
        computed: tuple[float, ...] | None = None,
        num_images: int = 1,
        rows: int = 1,
    ) -> Cost:
        """Operations that one prompt needs, by part; see `eagle.cost.count_cost` for the arguments.

        By default those of `predict_batch`, by top-level parameter.
        """
        del computed, rows
        batch = self.inputs_spec(1, text_length=text_tokens, max_images=num_images)
        params = jax.eval_shape(functools.partial(self.init_params, seed=0), batch)
        with counted_forms():
            flops, _ = trace_flops(functools.partial(self.predict_batch, plan=plan), params, batch)
        found = flops.grouped(
            lambda scope: next((name for name in scope.split("/") if name in params), "other")
        )
        return Cost(tuple(found.items()))

    @property
    def unpadded_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By path, the shapes in older checkpoints of parameters that are padded since."""
        return {}

    @property
    def tensor_divisor(self) -> int:
        """What the mesh's `tensor` axis should divide, so that caches are split with the layers."""
        return 1

    @property
    def max_positions(self) -> int | None:
        """Positions for a row's text, images and new tokens; None where there is no limit."""
        return None

    @property
    def depth(self) -> int:
        """Layers of the language model; 0 where there is none."""
        return 0

    def token_grids(self, plan: PrunePlan) -> Mapping[str, int]:
        """Sides of the grids that visual tokens are drawn on, by encoder, in the order of
        `VisualTokens.encoder`; empty where nothing can be drawn."""
        return {}

    @property
    def encoders(self) -> tuple[str, ...]:
        """Encoders whose feature ranks a plan may share tokens by."""
        return ()

    def with_remat(self, policy: str) -> Any:
        """The config with one remat policy everywhere."""
        return self.config


DEFAULT = "eagle"
_BUILT_IN = {"eagle": "meteor_jax.models.eagle.family"}  # imported when first asked for
_FAMILIES: dict[str, type[Family]] = {}


def register_family(name: str) -> Callable[[type[Family]], type[Family]]:
    """Class decorator: makes a family known as `config.model.family = name`."""

    def register(cls: type[Family]) -> type[Family]:
        _FAMILIES[name] = cls
        return cls

    return register


def get_family(name: str) -> type[Family]:
    """The family called `name`; ConfigError names the nearest."""
    if name not in _FAMILIES and name in _BUILT_IN:
        importlib.import_module(_BUILT_IN[name])
    if name not in _FAMILIES:
        raise ConfigError(f"no model family '{name}'.{suggest(name, {*_FAMILIES, *_BUILT_IN})}")
    return _FAMILIES[name]


def all_families() -> dict[str, type[Family]]:
    """Every family by name, the built-in ones first."""
    return {name: get_family(name) for name in (*_BUILT_IN, *_FAMILIES)}


def build_model(config: ModelConfig) -> Family:
    """The model of a config."""
    return get_family(config.family)(config)


def count_cost(config: ModelConfig, plan: PrunePlan, **options: Any) -> Cost:
    """`Family.count_cost` of the model of `config`."""
    return build_model(config).count_cost(plan, **options)
