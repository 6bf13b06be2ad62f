"""The shapes and dtypes that containers declare are those of the arrays in them."""

import dataclasses
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import AbstractArray, jaxtyped

from meteor_jax.models.family import build_model
from meteor_jax.types import Batch, DecodeCache, PruneTrace, VisualTokens
from tests.tiny_model import CONFIG, METEOR, MODEL, make_batch, plan


def check_shapes(container, *, where: str = "") -> int:
    """The arrays found in a container and in those within it, which must all be as declared. A
    letter stands for one size in the whole of a container."""
    hints = typing.get_type_hints(type(container), include_extras=True)
    where = where or type(container).__name__

    @jaxtyped(typechecker=None)
    def check() -> int:
        return sum(
            _check(getattr(container, field.name), hints[field.name], f"{where}.{field.name}")
            for field in dataclasses.fields(container)
        )

    return check()


def _check(value, hint, where: str) -> int:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (arg for arg in args if arg is not type(None))
        return 0 if value is None else _check(value, hint, where)
    if origin is tuple:
        return sum(_check(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        return sum(_check(item, args[1], f"{where}[{key}]") for key, item in value.items())
    if dataclasses.is_dataclass(hint):
        return check_shapes(value, where=where)
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        assert isinstance(value, hint), f"{where}: {value.dtype}{value.shape} is no {hint}"
        return 1
    return 0


def struct(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_everything_that_the_model_takes_and_gives_is_as_declared():
    batch, pruned = make_batch(), plan(METEOR)

    def run(batch: Batch):
        params = MODEL.init(jax.random.key(0), batch, plan=pruned)
        forward = MODEL.apply(params, batch, plan=pruned.for_training())
        encoded = MODEL.apply(params, batch.images[:, 0], plan=pruned, method="encode_images")
        prefilled = MODEL.apply(
            params,
            jax.tree.map(lambda x: x[:, None], encoded.tokens),
            image_valid=batch.image_valid,
            tokens=batch.tokens,
            text_valid=batch.text_valid,
            plan=pruned,
            max_new_tokens=2,
            method="prefill",
        )
        new = batch.tokens[:, :2]
        extended = MODEL.apply(params, prefilled.cache, new, method="extend")
        return forward, encoded, prefilled, extended

    forward, encoded, prefilled, extended = jax.eval_shape(run, batch)
    assert check_shapes(batch) == 6
    assert check_shapes(build_model(CONFIG).inputs_spec(2, segments=True)) == 7
    kept = sum(len(trace.kept) for trace in encoded.trace.encode.values())
    assert kept == 9  # three encoders, three segments
    assert check_shapes(encoded) == 4 + kept + 2
    assert check_shapes(forward) == 1 + kept + 2
    cache = 3 * 4 + 2  # of three ranges of layers
    assert check_shapes(prefilled) == 1 + cache + 2 * 4
    assert check_shapes(extended) == 1 + cache


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": np.zeros((3, 12), np.int64)},
        {"labels": np.zeros((3, 11), np.int32)},
        {"example_id": np.zeros((3, 1), np.int32)},
        {"images": np.zeros((3, 1, 32, 32), np.uint8)},
    ],
)
def test_another_dtype_or_shape_is_seen(changed):
    with pytest.raises(AssertionError, match=next(iter(changed))):
        check_shapes(make_batch().replace(**changed))


def test_sizes_are_told_apart_in_nested_containers():
    tokens = VisualTokens(
        struct(2, 5, 8, dtype=jnp.float32), struct(2, 5), struct(2, 5), struct(2, 5), span=5
    )
    assert check_shapes(tokens) == 4
    with pytest.raises(AssertionError, match="patch_index"):
        check_shapes(tokens.replace(patch_index=struct(2, 4)))
    trace = PruneTrace({}, struct(2, 5), struct(2, 5), loss=struct(3, dtype=jnp.float32))
    with pytest.raises(AssertionError, match="loss"):
        check_shapes(trace)
    with pytest.raises(AssertionError, match="overflowed"):
        check_shapes(DecodeCache((), struct(), struct()))
