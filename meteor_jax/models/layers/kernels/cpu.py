"""Products, attention and depthwise convolutions in the forms that are fast on CPUs.

`product`: XLA's CPU backend transposes the first factor of a product, and computes all that leads
to it in that strided order. JAX writes the gradient of a kernel as gradᵀ · x, the wider factor
first where a layer widens; here the narrower one comes first, which takes half the time. The
product itself stays a `dot_general`, so that rematerialisation policies know it, and everything
differentiates as often and as one likes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from meteor_jax.types import Array

CHUNK = 256  # query rows of one attention map that stays in a CPU's cache
CAUSAL_CHUNK = 128  # query rows of one causal map: fewer compute less that nobody may see


@jax.custom_jvp
def product(x: Array, kernel: Array) -> Array:
    """float[..., D] · float[D, F] → float[..., F]."""
    return jnp.matmul(x, kernel)


@product.defjvp
def _product_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    return jnp.matmul(x, kernel), jnp.matmul(dx, kernel) + by_kernel_p.bind(x, dkernel)


def _kernel_gradient(grad: Array, x: Array, _: ad.UndefinedPrimal) -> Array:
    rows = tuple(range(x.ndim - 1))
    if x.shape[-1] <= grad.shape[-1]:
        return jnp.tensordot(x, grad, axes=(rows, rows))
    return jnp.tensordot(grad, x, axes=(rows, rows)).T


def _x_gradient(grad: Array, _: ad.UndefinedPrimal, kernel: Array) -> Array:
    return jnp.matmul(grad, kernel.T)


# The same product, as what a change of the kernel moves: only a primitive can say what its
# transpose is and be differentiated again.
by_kernel_p = Primitive("product_by_kernel")
by_kernel_p.def_impl(jnp.matmul)
by_kernel_p.def_abstract_eval(
    lambda x, kernel: ShapedArray((*x.shape[:-1], kernel.shape[-1]), x.dtype)
)
ad.defbilinear(by_kernel_p, _x_gradient, _kernel_gradient)
batching.primitive_batchers[by_kernel_p] = lambda arrays, axes: (
    jax.vmap(jnp.matmul, in_axes=axes)(*arrays),
    0,
)
mlir.register_lowering(by_kernel_p, mlir.lower_fun(jnp.matmul, multiple_results=False))


def attend(q: Array, k: Array, v: Array, bias: Array, *, causal: bool, masked: bool) -> Array:
    """softmax(q·k + bias)·v, float[B, K, G, T, d] of scaled queries float[B, K, G, T, d] and
    float[B, K, S, d], in chunks of queries where the bias is that of plain or causal attention.

    Args:
        causal: whether `bias` (broadcast to [T, S]) is causal; masked: whether it masks more.
    """
    num_queries = q.shape[3]
    if not masked and not causal and num_queries > CHUNK:
        return _in_chunks(q, k, v, bias)
    if not masked and causal and CAUSAL_CHUNK < num_queries == k.shape[2]:
        return _causal_in_chunks(q, k, v, bias)
    return weighted_values(q, k, v, bias)


def _causal_in_chunks(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """`weighted_values` a chunk of queries at a time, over the keys that these can see alone."""
    chunks = []
    for start in range(0, q.shape[3], CAUSAL_CHUNK):
        stop = min(start + CAUSAL_CHUNK, q.shape[3])
        chunks.append(
            weighted_values(
                q[..., start:stop, :], k[..., :stop, :], v[..., :stop, :], bias[start:stop, :stop]
            )
        )
    return jnp.concatenate(chunks, axis=3)


def _in_chunks(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """`weighted_values` a head and a chunk of queries at a time: such a part of the map stays in
    a CPU's cache, which takes a third of the time of the whole map."""
    batch, num_kv, groups, num_queries, head_dim = q.shape
    rows = max(n for n in range(1, CHUNK + 1) if groups * num_queries % n == 0)
    if rows < CHUNK // 4:  # too small products
        return weighted_values(q, k, v, bias)
    q = q.reshape(batch * num_kv, -1, rows, head_dim)
    k, v = (array.reshape(-1, *array.shape[2:]) for array in (k, v))

    def head(arrays: tuple[Array, Array, Array]) -> Array:
        q, k, v = arrays
        k, v = k[None, None], v[None, None]

        def chunk(q: Array) -> Array:
            return weighted_values(q[None, None, None], k, v, bias)[0, 0, 0]

        return jax.lax.map(chunk, q)

    out = jax.lax.map(head, (q, k, v))
    return out.reshape(batch, num_kv, groups, num_queries, -1)


@jax.custom_jvp
def weighted_values(q: Array, k: Array, v: Array, bias: Array) -> Array:
    """softmax(q·k + bias)·v for float[B, K, G, T, d] and float[B, K, S, d]; no derivative by the
    bias."""
    return _mix(q, k, v, bias)[0]


def _mix(q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, Array, Array]:
    """The result, and the weights before they are divided by their float32 sums."""
    logits = _scores(q, k) + bias
    weight = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = weight.sum(-1, keepdims=True)
    weight = weight.astype(v.dtype)
    return (_values(weight, v) / total).astype(v.dtype), weight, total


def _scores(q: Array, k: Array) -> Array:
    return jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)


def _values(weight: Array, v: Array) -> Array:
    return jnp.einsum("bkgts,bksd->bkgtd", weight, v, preferred_element_type=jnp.float32)


@weighted_values.defjvp
def weighted_values_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # What a change of the scores moves is ∂o = Σ_s p·∂s·v − (Σ_s p·∂s)·o. Written so, the backward
    # pass takes Σ_d o·∂o where that of a softmax sums over the map (FlashAttention).
    q, k, v, bias = primals
    dq, dk, dv, _ = tangents
    out, weight, total = _mix(q, k, v, bias)
    moved = weight * (_scores(dq, k) + _scores(q, dk))
    change = _values(moved, v) - moved.sum(-1, keepdims=True) * out + _values(weight, dv)
    return out, (change / total).astype(v.dtype)


def sum_shifted(x: Array, kernel: Array) -> Array:
    """A depthwise convolution, of float[I, H, W, C] by float[k, k, 1, C], as a sum of shifted
    products."""
    (height, width), side = x.shape[1:3], kernel.shape[0]
    padded = _pad_same(x, side)
    total = jnp.zeros_like(x)
    for row in range(side):
        for column in range(side):
            window = padded[:, row : row + height, column : column + width]
            total += window * kernel[row, column, 0]
    return total


@jax.custom_jvp
def depthwise_shifted(x: Array, kernel: Array) -> Array:
    """The depthwise convolution as a sum of shifted products, which CPUs run far faster.

    Differentiating the sum is ten times slower than it, so its derivatives are written in forms
    whose transposes, which are the gradients, are fast.
    """
    return sum_shifted(x, kernel)


@depthwise_shifted.defjvp
def _depthwise_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    return sum_shifted(x, kernel), _sum_placed(dx, kernel) + _sum_rows(x, dkernel)


def _sum_placed(x: Array, kernel: Array) -> Array:
    """The depthwise convolution that places every product instead of fetching it: transposed, it
    fetches, which is `sum_shifted`."""
    (height, width), side = x.shape[1:3], kernel.shape[0]
    total: Any = 0
    for row in range(side):
        for column in range(side):
            rows, columns = (side - 1 - row, row), (side - 1 - column, column)
            total += jnp.pad(x * kernel[row, column, 0], ((0, 0), rows, columns, (0, 0)))
    margin = side // 2
    return total[:, margin : margin + height, margin : margin + width]


def _sum_rows(x: Array, kernel: Array) -> Array:
    """The depthwise convolution row by row. Transposed by the kernel, each step is a plain
    elementwise product, added to one total a kernel column, [kernel row, W, C]; the sums over W
    come last."""
    (num_images, height, width, channels), side = x.shape, kernel.shape[0]
    padded = _pad_same(x, side)
    columns = jnp.broadcast_to(
        kernel.astype(jnp.float32)[:, :, 0, None], (side, side, width, channels)
    )
    columns = tuple(columns[:, column] for column in range(side))

    def line(_: None, place: Array) -> tuple[None, Array]:
        image, row = place // height, place % height
        sizes = (1, side, padded.shape[2], channels)
        band = jax.lax.dynamic_slice(padded, (image, row, 0, 0), sizes)[0].astype(jnp.float32)
        total: Any = sum(
            (band[:, i : i + width] * column).sum(0) for i, column in enumerate(columns)
        )
        return None, total.astype(x.dtype)

    _, lines = jax.lax.scan(line, None, jnp.arange(num_images * height))
    return lines.reshape(x.shape)


def _pad_same(x: Array, side: int) -> Array:
    margin = side // 2
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
