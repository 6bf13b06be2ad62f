"""What the encoders and the decoder share: stacked blocks, products, sharding constraints.

B rows, T tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from meteor_jax.types import Array

# How activations lie on the mesh axes (data, fsdp, tensor), by axis letters. See parallel.py.
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


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return jnp.matmul(x, kernel)


def _product_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    # XLA's CPU backend transposes the first factor, and computes all that leads to it in that
    # strided order. So the narrower factor comes first: half the time of a gated MLP.
    if x.shape[-1] <= grad.shape[-1]:
        kernel_grad = jnp.tensordot(x, grad, axes=(rows, rows))
    else:
        kernel_grad = jnp.tensordot(grad, x, axes=(rows, rows)).T
    return jnp.matmul(grad, kernel.T), kernel_grad


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_backward)


def dense(features: int, *, dtype: Any, **options: Any) -> nn.Dense:
    """`nn.Dense` whose backward pass is fast on every backend; `options` are `nn.Dense`'s."""

    def dot_general(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
        return _product(x, kernel)

    return nn.Dense(features, dtype=dtype, dot_general=dot_general, **options)


@jax.custom_vjp
def gated_silu(gate: Array, up: Array) -> Array:
    """silu(gate) · up, whose gradient keeps nothing but its two inputs."""
    return jax.nn.silu(gate) * up


def _gated_silu_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid


gated_silu.defvjp(lambda gate, up: (gated_silu(gate, up), (gate, up)), _gated_silu_backward)


@flax.struct.dataclass
class StackOutput:
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

    With `in_place` each block's parameters are read out of the whole stack, so that no part of it
    is copied, which a new token would wait for. Not for training: the gradient of every block
    would be as large as the stack.

    Attributes:
        remat: "none", or a name in `jax.checkpoint_policies`, such as "nothing_saveable".
    """

    block: Callable[..., nn.Module]
    block_config: Any
    depth: int
    dtype: Any = jnp.float32
    remat: str = "none"

    def _template(self) -> nn.Module:
        return self.block(self.block_config, self.dtype, parent=None)

    @nn.compact
    def __call__(
        self, x: Array, *aux: Any, start: int = 0, stop: int | None = None, per_layer: Any = (),
        in_place: bool = False,
    ) -> StackOutput:
        template = self._template()

        def init(key: Array) -> Any:
            keys = jax.random.split(key, self.depth)
            return jax.vmap(lambda key: template.init(key, x, *aux)["params"])(keys)

        # `param` would trace `init` again at every call, to compare shapes.
        if self.has_variable("params", "stack"):
            stack = self.get_variable("params", "stack")
        else:
            stack = self.param("stack", init)
        stop = self.depth if stop is None else stop
        if start == stop:
            return StackOutput(x=x, last_input=x, extras=None)

        if in_place:
            layers = jnp.arange(start, stop)
        else:
            layers = jax.tree.map(lambda leaf: leaf[start:stop], stack)

        def read(layer: Any) -> Any:
            if not in_place:
                return layer
            return jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stack
            )

        def body(carry: tuple[Array, Array], layer: Any) -> tuple[tuple[Array, Array], Any]:
            x, _ = carry
            params, *own = layer
            out, extra = template.apply({"params": read(params)}, x, *aux, *own)
            return (out, x), extra

        if self.remat != "none":
            body = jax.checkpoint(
                body, policy=getattr(jax.checkpoint_policies, self.remat), prevent_cse=False
            )
        (x, last_input), extras = jax.lax.scan(body, (x, x), (layers, *per_layer))
        return StackOutput(x=x, last_input=last_input, extras=extras)

    def layer(self, index: int, *args: Any, method: str) -> Any:
        """Calls one method of block `index` with its own parameters."""
        stack = self.get_variable("params", "stack")
        params = jax.tree.map(lambda leaf: leaf[index], stack)
        return self._template().apply({"params": params}, *args, method=method)


def segment_bounds(depth: int, num_segments: int) -> tuple[int, ...]:
    """Where each of `num_segments` equal parts of `depth` blocks ends, e.g. 24 → (8, 16, 24)."""
    return tuple(round(depth * (i + 1) / num_segments) for i in range(num_segments))
