"""The rank of a feature map, by all its kinds."""

import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.pruning.budgets import Shared
from meteor_jax.pruning.ops import ranks
from meteor_jax.pruning.ops.ranks import RankKind, numerical_ranks, singular_values


def factors(num_tokens, width, *, count):
    random = np.random.default_rng(0)
    return random.normal(size=(num_tokens, count)) @ random.normal(size=(count, width))


def rank(features, **kind):
    (value,) = numerical_ranks(features, kinds=[RankKind(**kind)]).values()
    return value


def test_tolerance_counts_what_is_above_the_rounding_of_float32():
    assert rank(factors(40, 16, count=5), mode="tolerance") == 5
    assert rank(factors(16, 40, count=5), mode="tolerance") == 5
    # In float32 two factors of 3e-5 and 1e-7 of the first are told from rounding, and are not.
    assert rank(np.diag([1.0, 3e-5, 1e-7]), mode="tolerance") == 2


def test_energy_by_hand():
    # Squares 16, 4, 1 of 21: two make up 20/21 = 0.952, all three are needed for 0.99.
    features = jnp.diag(jnp.array([4.0, 2.0, 1.0]))
    assert [rank(features, energy=share) for share in (0.95, 0.99, 0.5)] == [2, 3, 1]


def test_effective_by_hand():
    # Entropy of (½, ¼, ¼): 1.5 ln 2.
    assert rank(np.diag([2.0, 1.0, 1.0, 0.0]), mode="effective") == pytest.approx(2**1.5)
    assert rank(np.eye(7), mode="effective") == pytest.approx(7)


@pytest.mark.parametrize("shape", [(576, 1024), (1024, 256)])
def test_forty_factors_are_forty_after_a_cast_to_bfloat16(shape):
    """The default must not count the cast's rounding; the tolerance does, so it is not that."""
    features = jnp.asarray(factors(*shape, count=40), jnp.bfloat16)
    kind = Shared(9).rank_kind
    measured = numerical_ranks(features, kinds=[kind, RankKind("tolerance")])
    assert abs(measured[str(kind)] - 40) <= 1
    assert measured["tolerance"] > 0.9 * min(shape)


def test_singular_values_are_those_of_the_map():
    features = factors(60, 33, count=33).astype(np.float32) * np.geomspace(1, 1e-5, 33)
    expected = np.linalg.svd(features, compute_uv=False)
    for x in (features, features.T):
        np.testing.assert_allclose(singular_values(x), expected, rtol=0, atol=1e-7 * expected[0])


def test_all_kinds_come_from_one_decomposition(monkeypatch):
    shapes = []
    eigvalsh = np.linalg.eigvalsh
    monkeypatch.setattr(
        ranks.np.linalg, "eigvalsh", lambda gram: shapes.append(gram.shape) or eigvalsh(gram)
    )
    monkeypatch.setattr(ranks.np.linalg, "svd", pytest.fail)
    kinds = (*ranks.ALL_KINDS, RankKind(energy=0.9))
    measured = numerical_ranks(factors(50, 20, count=9), kinds=kinds)
    assert list(measured) == ["energy 0.99", "effective", "tolerance", "energy 0.9"]
    assert shapes == [(20, 20)]  # the smaller side's


def test_maps_without_a_rank():
    assert set(numerical_ranks(jnp.zeros((4, 3))).values()) == {0.0}
    assert np.isnan(list(numerical_ranks(np.full((4, 3), np.nan)).values())).all()


def test_kinds_that_there_are_not():
    with pytest.raises(ValueError, match="expected one of energy, effective, tolerance, got 'ex"):
        RankKind("exact")
    for share in (0.0, 1.0, 99):
        with pytest.raises(ValueError, match="energy: expected a share between 0 and 1"):
            Shared(9, energy=share)
