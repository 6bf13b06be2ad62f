"""Equal blocks, run by parts."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from meteor_jax.models.layers import Stack

DEPTH, WIDTH = 5, 4


class Block(nn.Module):
    config: int
    dtype: object

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.config)(x)
        return x + y, y


STACK = Stack(Block, WIDTH, DEPTH)
X = jax.random.normal(jax.random.PRNGKey(0), (2, 3, WIDTH))
VARIABLES = STACK.init(jax.random.PRNGKey(1), X)


def run(x, variables=VARIABLES, **arguments):
    return STACK.apply(variables, x, **arguments)


@pytest.mark.parametrize(("start", "stop"), [(0, DEPTH), (0, 2), (1, 4), (4, DEPTH), (2, 2)])
def test_in_place_is_the_same(start, stop):
    sliced, in_place = (
        run(X, start=start, stop=stop, in_place=flag) for flag in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, sliced, in_place)


def test_parts_make_the_whole():
    whole, first = run(X), run(X, stop=2)
    rest = run(first.x, start=2)
    np.testing.assert_allclose(rest.x, whole.x, rtol=1e-6)
    np.testing.assert_allclose(rest.last_input, whole.last_input, rtol=1e-6)


def copies_of_parameters(**arguments):
    """How many arrays of several layers' parameters are cut out of the stack."""
    shapes = {leaf.shape[1:] for leaf in jax.tree.leaves(VARIABLES)}
    jaxpr = jax.make_jaxpr(lambda variables: run(X, variables, start=1, stop=4, **arguments))
    return sum(
        equation.primitive.name in ("slice", "dynamic_slice", "gather")
        and out.aval.shape[:1] == (3,) and out.aval.shape[1:] in shapes
        for equation in jaxpr(VARIABLES).jaxpr.eqns
        for out in equation.outvars
    )


def test_in_place_cuts_no_part_out_of_the_stack():
    assert copies_of_parameters(in_place=False) == 2  # kernels and biases
    assert copies_of_parameters(in_place=True) == 0
