"""What the encoders and the decoder share: attention, stacked blocks, sharding constraints.

B rows, T queries, S keys, H heads, K kv heads, D width, d head width, L layers.
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

MASKED = -1e30  # a score that softmax turns into exactly 0 in float32, without NaN in empty rows
QUERY_CHUNK = 256  # query rows of one attention map that `attention_received` holds at a time

# How activations lie on the mesh axes (data, fsdp, tensor), by axis letters. See parallel.py.
ACTIVATION_SPECS = {
    "btd": PartitionSpec(("data", "fsdp"), None, None),
    "bthd": PartitionSpec(("data", "fsdp"), None, "tensor", None),
    "btf": PartitionSpec(("data", "fsdp"), None, "tensor"),
    "btv": PartitionSpec(("data", "fsdp"), None, "tensor"),
    "bhwd": PartitionSpec(("data", "fsdp"), None, None, None),
}


def constrain(x: Array, axes: str) -> Array:
    """Pins `x` to the mesh in force (`jax.set_mesh`); the identity where there is none."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, ACTIVATION_SPECS[axes])


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


@jax.custom_vjp
def _weighted_values(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """softmax(q·k + bias)·v for float[B, K, G, T, d] and float[B, K, S, d]."""
    return _weighted_values_forward(q, k, v, bias)[0]


def _weighted_values_forward(q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, Any]:
    logits = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) + bias
    weight = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = weight.sum(-1, keepdims=True)
    weight = weight.astype(v.dtype)
    out = jnp.einsum("bkgts,bksd->bkgtd", weight, v, preferred_element_type=jnp.float32) / total
    return out.astype(v.dtype), (q, k, v, out, weight, total)


def _weighted_values_backward(saved: Any, grad: Array) -> tuple[Array, Array, Array, None]:
    # Σ_s p·∂p = Σ_d o·∂o, so the softmax's gradient needs no sum over the map (FlashAttention).
    q, k, v, out, weight, total = saved
    grad = grad / total
    inner = (grad * out).sum(-1, keepdims=True)
    grad = grad.astype(v.dtype)
    towards = jnp.einsum("bkgtd,bksd->bkgts", grad, v, preferred_element_type=jnp.float32)
    scores = (weight * (towards - inner)).astype(v.dtype)
    return (
        jnp.einsum("bkgts,bksd->bkgtd", scores, k),
        jnp.einsum("bkgts,bkgtd->bksd", scores, q),
        jnp.einsum("bkgts,bkgtd->bksd", weight, grad),
        None,
    )


_weighted_values.defvjp(_weighted_values_forward, _weighted_values_backward)


def attend(
    q: Array, k: Array, v: Array, *, causal: bool = False, mask: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Softmax attention, float32 softmax.

    With `causal`, query t sees keys 0..t: packed sequences need no other mask, because their
    invalid entries stand last.

    Shapes:
        q: float[B, T, H, d]; k, v: float[B, S, K, d], H a multiple of K; v may have another d.
        mask: bool[B, T, S] or bool[B, 1, S], True where a query may look.
        returns: float[B, T, H, d], with the d of v.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    # One batched product a (row, kv head): on CPUs twice as fast as the five-axis einsum.
    q = q.reshape(batch, num_queries, num_kv, num_heads // num_kv, head_dim)
    q = q.transpose(0, 2, 3, 1, 4) * jnp.asarray(scale, q.dtype)
    bias = jnp.zeros((1, 1))
    if causal:
        bias = jnp.where(jnp.tril(jnp.ones((num_queries, k.shape[1]), bool)), 0.0, MASKED)
    if mask is not None:
        bias = bias + jnp.where(mask[:, None, None], 0.0, MASKED)
    out = _weighted_values(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), bias)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, num_queries, num_heads, v.shape[-1])


def attention_received(
    q: Array, k: Array, *, row_weight: Array, mask: Array | None = None,
    scale: float | None = None,
) -> Array:
    """The attention that each key gets from a weighted mean of query rows, head by head.

    The softmax runs over all keys, so the mass on a part of them is not renormalised. The map is
    built `QUERY_CHUNK` rows at a time and never stored. No gradient flows through it.

    Shapes:
        q: float[B, T, H, d]; k: float[B, S, K, d].
        row_weight: float[B, T]; rows are averaged with these weights (all 0 gives 0).
        mask: bool[B, T, S], True where a query may look.
        returns: float32[B, H, S].
    """
    q, k = jax.lax.stop_gradient((q, k))
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    weight = row_weight.astype(jnp.float32)
    weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-9)
    q = q.reshape(batch, num_queries, num_kv, num_heads // num_kv, head_dim)

    def received(q: Array, weight: Array, mask: Array | None) -> Array:
        logits = jnp.einsum("btkgd,bskd->bkgts", q * scale, k, preferred_element_type=jnp.float32)
        if mask is not None:
            logits = jnp.where(mask[:, None, None], logits, MASKED)
        return jnp.einsum("bkgts,bt->bkgs", jax.nn.softmax(logits, axis=-1), weight)

    total = jnp.zeros((batch, num_kv, num_heads // num_kv, k.shape[1]), jnp.float32)
    for start in range(0, num_queries, QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        total += received(q[:, rows], weight[:, rows], None if mask is None else mask[:, rows])
    return total.reshape(batch, num_heads, k.shape[1])


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
        self, x: Array, *aux: Any, start: int = 0, stop: int | None = None, per_layer: Any = ()
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

        def body(carry: tuple[Array, Array], layer: Any) -> tuple[tuple[Array, Array], Any]:
            x, _ = carry
            params, *own = layer
            out, extra = template.apply({"params": params}, x, *aux, *own)
            return (out, x), extra

        if self.remat != "none":
            body = jax.checkpoint(
                body, policy=getattr(jax.checkpoint_policies, self.remat), prevent_cse=False
            )
        layers = jax.tree.map(lambda leaf: leaf[start:stop], stack)
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
