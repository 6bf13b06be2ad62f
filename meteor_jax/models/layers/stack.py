"""What the encoders and the decoder share: stacked blocks, products, sharding constraints.

B rows, T tokens, D width, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from meteor_jax.models.layers.kernels.cpu import product
from meteor_jax.models.layers.platform import target_platform
from meteor_jax.models.layers.remat import remat_policy
from meteor_jax.types import Array

Run = tuple[int, int, int]  # of blocks: the first, the one after the last, their kind

# How activations are sharded over the mesh axes (data, fsdp, tensor), by axis letters.
ACTIVATION_SPECS = {
    "btd": PartitionSpec(("data", "fsdp"), None, None),
    "btd by width": PartitionSpec("data", None, "fsdp"),  # as rows of the embedding are split
    "bthd": PartitionSpec(("data", "fsdp"), None, "tensor", None),
    "btf": PartitionSpec(("data", "fsdp"), None, "tensor"),
    "btv": PartitionSpec(("data", "fsdp"), None, "tensor"),
    "bhwd": PartitionSpec(("data", "fsdp"), None, None, None),
    "lbshd": PartitionSpec(None, ("data", "fsdp"), None, "tensor", None),  # cached keys, values
    "bs": PartitionSpec(("data", "fsdp"), None),
}


def constrain(x: Array, axes: str) -> Array:
    """Pins `x` to the mesh in force (`jax.set_mesh`); the identity where there is none. `axes` is
    a key of `ACTIVATION_SPECS`.

    What `tensor` does not divide stays whole on every device: of kv heads split unevenly, the
    SPMD partitioner would move the whole cache at every token.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = [
        None if axis == "tensor" and size % mesh.shape[axis] else axis
        for axis, size in zip(ACTIVATION_SPECS[axes], x.shape, strict=True)
    ]
    if mesh.manual_axes:  # in `shard_map` over rows, which are split already
        spec = [axis if axis == "tensor" else None for axis in spec]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def dense(features: int, *, dtype: Any, **options: Any) -> nn.Dense:
    """`nn.Dense`, on CPUs with their own `product`; `options` are `nn.Dense`'s."""
    if target_platform() == "cpu":
        options["dot_general"] = lambda x, kernel, *_, **__: product(x, kernel)
    return nn.Dense(features, dtype=dtype, **options)


@jax.custom_jvp
def gated_silu(gate: Array, up: Array) -> Array:
    """silu(gate) · up, whose gradient keeps two arrays and not the five of its operations."""
    return jax.nn.silu(gate) * up


@gated_silu.defjvp
def _gated_silu_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    gate, up = primals
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    by_gate = up * sigmoid * (1 + gate * (1 - sigmoid))
    return silu * up, tangents[0] * by_gate + tangents[1] * silu


class StackOutput(flax.struct.PyTreeNode):
    """The residual stream after some blocks, the input of the last of them, and what each
    block returned besides (stacked, `[L, ...]`)."""

    x: Array
    last_input: Array
    extras: Any


class Stack(nn.Module):
    """`depth` equal blocks, their parameters stacked on a leading axis `[depth, ...]`.

    A call runs the static slice `[start:stop]` with `lax.scan`, so the parameter tree is the same
    however pruning splits the depth. `block(block_config, dtype)` must be a module whose call
    takes `(x, *aux)` and returns `(x, extra)`; where `per_layer` arrays `[stop - start, ...]` are
    given, each block gets its own slice of them as one more argument.

    Where nothing is differentiated, each block's parameters are read out of the whole stack, so
    that no part of it is copied. Where something is, the slice is cut out first: the gradient of a
    block that reads the whole stack would be as large as the stack.

    Attributes:
        remat: which values the backward pass finds saved; see `remat_policy`.
    """

    block: Callable[..., nn.Module]
    block_config: Any
    depth: int
    dtype: Any = jnp.float32
    remat: str = "none"

    def _template(self) -> nn.Module:
        return self.block(self.block_config, self.dtype, parent=None)

    def __call__(
        self, x: Array, *aux: Any, start: int = 0, stop: int | None = None, per_layer: Any = ()
    ) -> StackOutput:
        run = (start, self.depth if stop is None else stop, 0)
        return self.alternate(x, runs=(run,), aux=(aux,), per_layer=(per_layer,))

    @nn.compact
    def alternate(
        self,
        x: Array,
        *,
        runs: Sequence[Run],
        aux: Sequence[tuple[Any, ...]],
        per_layer: Sequence[Any] | None = None,
    ) -> StackOutput:
        """Blocks of several kinds, which differ in `aux` alone, such as the windows they attend
        in. Runs that repeat are scanned over, so that the program holds one copy of each.

        Args:
            runs: one after the other, (start, stop, kind) of blocks of one kind.
            aux: by kind, what its blocks take after `x`.
            per_layer: by kind, arrays whose leading axis counts the blocks of that kind in `runs`.
        """
        template = self._template()

        def init(key: Array) -> Any:
            keys = jax.random.split(key, self.depth)
            first = aux[runs[0][2]]
            return jax.vmap(lambda key: template.init(key, x, *first)["params"])(keys)

        # `param` would trace `init` again at every call, to compare shapes.
        if self.has_variable("params", "stack"):
            stack = self.get_variable("params", "stack")
        else:
            stack = self.param("stack", init)
        if runs[0][0] == runs[-1][1]:
            return StackOutput(x=x, last_input=x, extras=None)
        policy = remat_policy(self.remat)

        def run(stack: Any, x: Array, aux: Any, per_layer: Any, *, in_place: bool) -> StackOutput:
            def call(layer: Any, x: Array, *aux: Any) -> Any:
                params = _read(stack, layer) if in_place else layer
                return template.apply({"params": params}, x, *aux)

            block = call
            if policy is not None:
                block = jax.checkpoint(call, policy=policy, prevent_cse=False)
            return _scan_runs(
                block, None if in_place else stack, x, runs=runs, aux=aux, per_layer=per_layer
            )

        per_layer = ((),) * len(aux) if per_layer is None else tuple(per_layer)
        return _unless_differentiated(
            functools.partial(run, in_place=True), functools.partial(run, in_place=False)
        )(stack, x, tuple(aux), per_layer)

    def layer(self, index: int, *args: Any, method: str) -> Any:
        """Calls one method of block `index` with its own parameters."""
        stack = self.get_variable("params", "stack")
        params = jax.tree.map(lambda leaf: leaf[index], stack)
        return self._template().apply({"params": params}, *args, method=method)


def _read(stack: Any, index: Array) -> Any:
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(
            leaf, index, keepdims=False, allow_negative_indices=False
        ),
        stack,
    )


def _scan_runs(
    block: Callable[..., tuple[Array, Any]],
    stack: Any,
    x: Array,
    *,
    runs: Sequence[Run],
    aux: Any,
    per_layer: Any,
) -> StackOutput:
    """Runs one after the other, those that repeat in one scan. `block` takes a layer, which is its
    slice of `stack`, or its number where that is None, then `x` and what its kind takes."""
    number = jnp.int32(runs[0][0]) if stack is None else None

    def run_blocks(carry: Any, kind: int, arrays: tuple[Any, Any], length: int) -> Any:
        def body(carry: Any, arrays: tuple[Any, Any]) -> Any:
            (x, _, number), (layer, own) = carry, arrays
            out, extra = block(layer if number is None else number, x, *aux[kind], *own)
            return (out, x, None if number is None else number + 1), extra

        return jax.lax.scan(body, carry, arrays, length=length)

    carry, extras, done = (x, x, number), [], [0] * len(aux)
    for pattern, count in _repeats(runs):
        start, period = pattern[0][0], pattern[-1][1] - pattern[0][0]
        sizes = [
            sum(stop - first for first, stop, of in pattern if of == kind)
            for kind in range(len(aux))
        ]
        layers = _cut(stack, start, start + count * period)
        own = [
            _cut(arrays, before, before + count * size)
            for arrays, before, size in zip(per_layer, done, sizes, strict=True)
        ]
        done = [before + count * size for before, size in zip(done, sizes, strict=True)]
        if count == 1:
            kind = pattern[0][2]
            carry, extra = run_blocks(carry, kind, (layers, own[kind]), period)
            extras.append(extra)
            continue

        def run_period(carry: Any, arrays: Any, *, pattern: Sequence[Run] = pattern) -> Any:
            layers, own = arrays
            extras, seen = [], [0] * len(aux)
            for first, stop, kind in pattern:
                at, length = first - pattern[0][0], stop - first
                mine = _cut(own[kind], seen[kind], seen[kind] + length)
                carry, extra = run_blocks(
                    carry, kind, (_cut(layers, at, at + length), mine), length
                )
                seen[kind] += length
                extras.append(extra)
            return carry, _join(extras)

        periods = jax.tree.map(
            lambda leaf, count=count: leaf.reshape(count, -1, *leaf.shape[1:]), (layers, own)
        )
        carry, extra = jax.lax.scan(run_period, carry, periods, length=count)
        extras.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), extra))
    return StackOutput(carry[0], carry[1], extras=_join(extras))


def _cut(tree: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[start:stop], tree)


def _join(trees: Sequence[Any]) -> Any:
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _repeats(runs: Sequence[Run]) -> Iterator[tuple[Sequence[Run], int]]:
    """The runs in order: several that come again and again as (the first of them, how often),
    any other as (itself, 1)."""
    shapes = [(stop - start, kind) for start, stop, kind in runs]
    at = 0
    while at < len(runs):
        size, count = 1, 1
        for longer in range(2, (len(runs) - at) // 2 + 1):
            times = 1
            while shapes[at : at + longer] == shapes[at + times * longer :][:longer]:
                times += 1
            if times > 1:
                size, count = longer, times
                break
        yield runs[at : at + size], count
        at += size * count


def _unless_differentiated(
    plain: Callable[..., Any], differentiable: Callable[..., Any]
) -> Callable[..., Any]:
    """`plain`, of which no derivatives are taken: those of `differentiable`, the same function."""
    call = jax.custom_jvp(plain)

    def jvp(primals: Any, tangents: Any) -> Any:
        primals, tree = jax.tree.flatten(primals)
        tangents = jax.tree.leaves(tangents)
        moving = [
            i
            for i, tangent in enumerate(tangents)
            if not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
        ]

        def of_moving(*values: Any) -> Any:
            merged = dict(enumerate(primals)) | dict(zip(moving, values, strict=True))
            return differentiable(*tree.unflatten(merged.values()))

        return jax.jvp(
            of_moving, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving)
        )

    call.defjvp(jvp, symbolic_zeros=True)
    return call


def segment_bounds(depth: int, num_segments: int, *, period: int = 1) -> tuple[int, ...]:
    """Where each of `num_segments` equal parts of `depth` blocks ends, e.g. 24 → (8, 16, 24).

    Blocks that come in periods are parted between two periods, as near to equal parts as can be,
    e.g. 24 by 3 → (9, 15, 24), if there is a period for each part.
    """
    if depth // period < num_segments:
        period = 1
    ends = [round(depth / period * i / num_segments) for i in range(1, num_segments)]
    return (*(period * end for end in ends), depth)
