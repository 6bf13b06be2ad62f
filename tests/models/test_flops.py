"""The counter against programs whose operations are known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from meteor_jax.models.flops import counted_forms, trace_flops
from meteor_jax.models.layers.attention import attend
from meteor_jax.parallel.mesh import MeshConfig, make_mesh


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def square(x):
    return x @ x


@jax.custom_jvp
def custom_square(x):
    return x @ x


custom_square.defjvp(lambda x, dx: (square(*x), square(*dx)))


def count(function, *args):
    return trace_flops(function, *args)[0]


X = shape(4, 4)
ONCE = 2 * 4**3


def convolve(x, kernel, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (lambda x, y: jnp.einsum("bik,bkj->bij", x, y), (shape(3, 2, 5), shape(3, 5, 7)), 420),
        (convolve, (shape(1, 8, 8, 3), shape(2, 2, 3, 5)), 2 * 16 * 5 * 12),
        (
            lambda x, k: convolve(x, k, feature_group_count=6),
            (shape(1, 8, 8, 6), shape(2, 2, 1, 6)),
            2 * 16 * 6 * 4,
        ),
        (lambda x: jax.lax.scan(lambda x, _: (square(x), None), x, None, length=3), (X,), 3 * ONCE),
        (lambda x: jax.lax.map(square, x), (shape(5, 4, 4),), 5 * ONCE),
        (jax.jit(lambda x: jax.checkpoint(square)(x)), (X,), ONCE),
        (custom_square, (X,), ONCE),
        (lambda x: (square(x), x)[1], (X,), 0),
    ],
    ids=[
        "einsum",
        "convolution",
        "depthwise",
        "scan",
        "map",
        "jit, remat",
        "custom",
        "unused",
    ],
)
def test_by_hand(function, args, expected):
    assert count(function, *args).total == expected


def test_operations_have_the_names_around_them():
    def program(x):
        with jax.named_scope("a"):
            x = jax.lax.scan(
                lambda x, _: (jax.named_scope("b")(square)(x), None), x, None, length=2
            )
        return square(x[0])

    assert dict(count(program, X).by_scope) == {"a/b": 2 * ONCE, "": ONCE}


def test_of_a_conditional_the_largest_branch_counts_or_those_that_ran():
    def program(index, x):
        with jax.named_scope("choice"):
            branches = [square, lambda x: square(square(x)), lambda x: x]
            return jax.lax.map(lambda x: jax.lax.switch(index, branches, x), x)

    flops = count(program, jax.ShapeDtypeStruct((), jnp.int32), shape(10, 4, 4))
    assert flops.total == 20 * ONCE
    by_scope = flops.grouped(lambda scope: scope.split("/")[0], weights={0: (0.5, 0.25, 0.25)})
    assert by_scope == {"choice": 10 * ONCE}


def test_rematerialisation_counts_but_is_not_needed():
    def loss(block, x, w):
        block = jax.checkpoint(block, prevent_cse=False)
        return jax.lax.scan(lambda x, _: (block(x, w), None), x, None, length=3)[0].sum()

    def block(x, w):
        return jnp.tanh(x @ w) @ w

    flops = count(jax.grad(lambda x, w: loss(block, x, w), argnums=(0, 1)), X, X)
    assert flops.needed == 3 * (2 + 4) * ONCE  # the block; gradients of two products by two
    assert flops.total == flops.needed + 3 * ONCE  # the product before tanh once more


def test_all_shards_count():
    mesh = make_mesh(MeshConfig(2, 4))
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(
            lambda x: jnp.einsum("bik,bkj->bij", x, x),
            in_specs=P(("data", "fsdp")),
            out_specs=P(("data", "fsdp")),
        )
        assert count(sharded, shape(16, 4, 4)).total == 16 * ONCE


def test_attention_counts_over_all_pairs_wherever_it_runs():
    heads = shape(1, 512, 2, 8)
    with counted_forms():
        flops = count(lambda q: attend(q, q, q, causal=True), heads)
    assert flops.total == 2 * 2 * 2 * 8 * 512**2
