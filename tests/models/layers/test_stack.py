"""Equal blocks, run by parts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.layers.stack import Stack, segment_bounds
from tests.programs import count_primitives, equations

DEPTH, WIDTH = 5, 4


class Block(nn.Module):
    config: int
    dtype: object

    @nn.compact
    def __call__(self, x, scale=1.0):
        y = nn.Dense(self.config)(x) * scale
        return x + y, y


STACK = Stack(Block, WIDTH, DEPTH)
X = np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype(np.float32)
VARIABLES = jax.jit(STACK.init)(jax.random.key(1), X)


@functools.partial(jax.jit, static_argnames=("start", "stop"))
def run(x, variables=VARIABLES, **arguments):
    return STACK.apply(variables, x, **arguments)


@functools.partial(jax.jit, static_argnames="scales")
def naively(x, variables, scales):
    """Block by block, the scale of each given: the last output and input, and all extras."""
    extras, last = [], x
    for index, scale in scales:
        params = jax.tree.map(lambda leaf, index=index: leaf[index], variables["params"]["stack"])
        last = x
        x, extra = Block(WIDTH, jnp.float32).apply({"params": params}, x, scale)
        extras.append(extra)
    return x, last, jnp.stack(extras)


@pytest.mark.parametrize(("start", "stop"), [(0, DEPTH), (0, 2), (1, 4), (4, DEPTH)])
def test_a_part_is_its_blocks_one_after_the_other(start, stop):
    out = run(X, start=start, stop=stop)
    expected = naively(X, VARIABLES, tuple((i, 1.0) for i in range(start, stop)))
    for ours, theirs in zip((out.x, out.last_input, out.extras), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_no_blocks_change_nothing():
    out = run(X, start=2, stop=2)
    np.testing.assert_array_equal(out.x, X)
    assert out.extras is None


def test_parts_make_the_whole():
    whole, first = run(X), run(X, stop=2)
    rest = run(first.x, start=2)
    np.testing.assert_allclose(rest.x, whole.x, rtol=1e-6)
    np.testing.assert_allclose(rest.last_input, whole.last_input, rtol=1e-6)


def loss(variables, x):
    return (run(x, variables, start=1, stop=4).x ** 2).sum()


def cut_out_of_the_stack(program):
    """Shapes of what holds several layers' parameters but not all, in a traced program."""
    shapes = {leaf.shape[1:] for leaf in jax.tree.leaves(VARIABLES)}
    return [
        out.aval.shape
        for equation in equations(program)
        for out in equation.outvars
        if out.aval.shape[1:] in shapes
        and 1 < out.aval.shape[0] < DEPTH
        and equation.primitive.name in ("slice", "dynamic_slice", "gather")
    ]


def test_without_a_gradient_no_part_is_cut_out_of_the_stack():
    assert cut_out_of_the_stack(jax.make_jaxpr(loss)(VARIABLES, X)) == []


def test_a_blocks_gradient_is_no_larger_than_the_block():
    program = jax.make_jaxpr(jax.grad(loss))(VARIABLES, X)
    assert len(cut_out_of_the_stack(program)) == 2  # kernels and biases
    whole = {leaf.shape for leaf in jax.tree.leaves(VARIABLES)}
    for equation in equations(program):
        if equation.primitive.name == "scan":
            inside = equations(equation.params["jaxpr"])
            assert not any(out.aval.shape in whole for e in inside for out in e.outvars)


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "of the input alone"])
def test_gradients_are_those_of_the_blocks(frozen):
    def naive(variables, x):
        return (naively(x, variables, ((1, 1.0), (2, 1.0), (3, 1.0)))[0] ** 2).sum()

    arguments = (1,) if frozen else (0, 1)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-4),
        jax.jit(jax.grad(loss, arguments))(VARIABLES, X),
        jax.jit(jax.grad(naive, arguments))(VARIABLES, X),
    )


def test_forward_differentiation():
    @jax.jit
    def both_ways(arguments):
        change, gradient = jax.tree.map(jnp.cos, arguments), jax.grad(loss, (0, 1))(*arguments)
        products = jax.tree.map(lambda a, b: (a * b).sum(), gradient, change)
        return jax.jvp(loss, arguments, change)[1], sum(jax.tree.leaves(products))

    np.testing.assert_allclose(*both_ways((VARIABLES, X)), rtol=1e-5)


def test_kinds_that_take_turns():
    """Eight blocks, every third doubled, the first and the last run cut off."""
    stack = Stack(Block, WIDTH, 8)
    variables = jax.jit(stack.init)(jax.random.key(1), X)
    runs = ((1, 2, 0), (2, 3, 1), (3, 5, 0), (5, 6, 1), (6, 8, 0))

    def outputs(variables):
        out = stack.apply(
            variables,
            X,
            runs=runs,
            aux=((), ()),
            method="alternate",
            per_layer=((jnp.arange(1.0, 6.0),), (jnp.asarray([20.0, 30.0]),)),
        )
        return out.x, out.last_input, out.extras

    scales = ((1, 1.0), (2, 20.0), (3, 2.0), (4, 3.0), (5, 30.0), (6, 4.0), (7, 5.0))
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4)

    def with_gradient(function):
        def loss(variables):
            return function(variables)[0].sum(), function(variables)

        return jax.jit(jax.grad(loss, has_aux=True))(variables)

    ours, theirs = map(with_gradient, (outputs, lambda v: naively(X, v, scales)))
    jax.tree.map(assert_close, ours, theirs)


def test_runs_that_repeat_are_in_the_program_once():
    stack = Stack(Block, WIDTH, 9)
    variables = jax.jit(stack.init)(jax.random.key(1), X)
    runs = [
        (first, first + size, kind)
        for i in range(0, 9, 3)
        for first, size, kind in ((i, 2, 0), (i + 2, 1, 1))
    ]

    def forward(variables):
        aux = ((1.0,), (2.0,))
        return stack.apply(variables, X, runs=tuple(runs), aux=aux, method="alternate").x

    scales = tuple((i, 2.0 if i % 3 == 2 else 1.0) for i in range(9))
    expected = naively(X, variables, scales)[0]
    np.testing.assert_allclose(jax.jit(forward)(variables), expected, rtol=1e-4)
    assert count_primitives(jax.make_jaxpr(forward)(variables), "dot_general") == 2


def test_segments_of_whole_periods():
    assert segment_bounds(24, 3) == (8, 16, 24)
    assert segment_bounds(24, 3, period=3) == (9, 15, 24)
    assert segment_bounds(12, 3, period=3) == (3, 9, 12)
    assert segment_bounds(4, 3, period=3) == segment_bounds(4, 3)  # fewer periods than segments
