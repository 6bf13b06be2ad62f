import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.pruning.encode import (
    EncoderCut,
    allocate,
    cut_tokens,
    mean_token_similarity,
)

# Six tokens whose mean is (1, 0): cosines with it 1, 1, 0.6, 0.6, −1 and 0 by hand.
SIX = np.array([[[2, 0], [4, 0], [0.75, 1], [0.75, -1], [-1.5, 0], [0, 0]]], np.float32)
RASTER = np.array([[10, 11, 12, 13, 14, 15]], np.int32)


def test_mean_token_by_hand():
    np.testing.assert_allclose(
        mean_token_similarity(jnp.asarray(SIX)), [[1, 1, 0.6, 0.6, -1, 0]], atol=1e-6
    )


def test_mean_token_keeps_the_least_redundant():
    x, raster = cut_tokens(jnp.asarray(SIX), jnp.asarray(RASTER), cut=EncoderCut(4))
    np.testing.assert_array_equal(raster, [[12, 13, 14, 15]])
    np.testing.assert_array_equal(x, SIX[:, 2:])


@pytest.mark.parametrize("criterion", ["attention", "cls"])
def test_attention_keeps_the_most_looked_at(criterion):
    scores = jnp.array([[0.1, 0.5, 0.0, 0.2, 0.9, 0.3]])
    cut = EncoderCut(3, criterion)
    _, raster = cut_tokens(jnp.asarray(SIX), jnp.asarray(RASTER), cut=cut, attention=lambda: scores)
    np.testing.assert_array_equal(raster, [[11, 14, 15]])


@pytest.mark.parametrize(("keep", "places"), [(1, [3]), (2, [1, 4]), (3, [1, 3, 5])])
def test_uniform_stride(keep, places):
    cut = EncoderCut(keep, "uniform")
    _, raster = cut_tokens(jnp.asarray(SIX), jnp.asarray(RASTER), cut=cut)
    np.testing.assert_array_equal(raster, RASTER[:, places])


@pytest.mark.parametrize(("num_tokens", "keep"), [(36, 35), (36, 20), (100, 99), (7, 4)])
def test_uniform_keeps_exactly_as_many_as_asked(num_tokens, keep):
    x = jnp.ones((1, num_tokens, 1))
    raster = jnp.arange(num_tokens)[None]
    _, kept = cut_tokens(x, raster, cut=EncoderCut(keep, "uniform"))
    gaps = np.diff(np.asarray(kept)[0])
    assert set(gaps) <= {num_tokens // keep, num_tokens // keep + 1}


def test_random_depends_on_the_image_and_the_seed_alone():
    x, raster = jnp.ones((3, 50, 2)), jnp.broadcast_to(jnp.arange(50), (3, 50))

    def kept(image_seed, seed=0):
        rows = len(image_seed)
        return np.asarray(
            cut_tokens(
                x[:rows],
                raster[:rows],
                cut=EncoderCut(20, "random", seed),
                image_seed=jnp.asarray(image_seed, jnp.uint32),
            )[1]
        )

    one = kept([7, 4_000_000_000, 7])
    assert (one[0] != one[1]).any()
    np.testing.assert_array_equal(one[0], one[2])
    np.testing.assert_array_equal(kept([4_000_000_000])[0], one[1])
    assert (kept([7], seed=4_000_000_000)[0] != one[0]).any()


def test_keeping_all_gives_the_inputs_back():
    x, raster = jnp.asarray(SIX), jnp.asarray(RASTER)
    same_x, same_raster = cut_tokens(x, raster, cut=EncoderCut(6, "attention"))
    assert same_x is x and same_raster is raster


def test_no_gradient_through_the_scores():
    def kept_sum(x):
        return cut_tokens(x, jnp.asarray(RASTER), cut=EncoderCut(4))[0].sum()

    expected = np.zeros_like(SIX)
    expected[:, 2:] = 1.0  # a gather, nothing else
    np.testing.assert_array_equal(jax.grad(kept_sum)(jnp.asarray(SIX)), expected)


def test_bad_cuts():
    with pytest.raises(ValueError, match="at least 1"):
        EncoderCut(0)
    with pytest.raises(ValueError, match="expected one of mean_token, attention"):
        EncoderCut(3, "mean")
    with pytest.raises(ValueError, match="7 of 6"):
        cut_tokens(jnp.asarray(SIX), jnp.asarray(RASTER), cut=EncoderCut(7))
    with pytest.raises(ValueError, match="needs attention"):
        cut_tokens(jnp.asarray(SIX), jnp.asarray(RASTER), cut=EncoderCut(3, "attention"))
    with pytest.raises(ValueError, match="needs image_seed"):
        cut_tokens(jnp.asarray(SIX), jnp.asarray(RASTER), cut=EncoderCut(3, "random"))


AVAILABLE = {"clip": 36, "convnext": 64, "pix2struct": 81}
RANKS = {"clip": 10.0, "convnext": 20.0, "pix2struct": 30.0}


def test_allocate_by_rank():
    assert allocate(60, ranks=RANKS, available=AVAILABLE) == {
        "clip": 10,
        "convnext": 20,
        "pix2struct": 30,
    }


def test_allocate_inversely():
    counts = allocate(66, ranks=RANKS, available=AVAILABLE, assignment="inverse_rank")
    assert counts == {"clip": 36, "convnext": 18, "pix2struct": 12}


def test_allocate_uniformly():
    for ranks in ({}, dict.fromkeys(AVAILABLE, 0.0)):
        counts = allocate(60, ranks=ranks, available=AVAILABLE, assignment="uniform")
        assert counts == dict.fromkeys(AVAILABLE, 20)


def test_allocate_gives_what_is_over_to_the_others():
    # By rank 25, 50, 75; 64 tokens are enough for 50, 81 for 75; then 30, 60, 90 → 81, 69 left.
    assert allocate(180, ranks=RANKS, available=AVAILABLE) == {
        "clip": 35,
        "convnext": 64,
        "pix2struct": 81,
    }


@pytest.mark.parametrize("assignment", ["rank", "uniform", "inverse_rank"])
def test_allocate_sums_exactly_and_respects_caps(assignment):
    random = np.random.default_rng(0)
    for _ in range(200):
        names = [f"encoder{i}" for i in range(random.integers(1, 6))]
        available = {name: int(random.integers(1, 100)) for name in names}
        ranks = {name: float(random.uniform(0.5, 50)) for name in names}
        total = int(random.integers(0, sum(available.values()) + 1))
        counts = allocate(total, ranks=ranks, available=available, assignment=assignment)
        assert sum(counts.values()) == total
        assert all(0 <= counts[name] <= available[name] for name in names)
        assert list(counts) == names


def test_allocate_in_windows():
    random = np.random.default_rng(0)
    for _ in range(200):
        available = {"clip": 40, "eva": 64, "sam": 75}
        ranks = {name: float(random.uniform(0.5, 50)) for name in available}
        multiple_of = {"eva": 16, "sam": 25}
        total = int(random.integers(40, 60))
        counts = allocate(total, ranks=ranks, available=available, multiple_of=multiple_of)
        assert sum(counts.values()) == total
        assert all(0 <= counts[name] <= available[name] for name in available)
        assert counts["eva"] % 16 == counts["sam"] % 25 == 0


def test_allocate_rounds_windows_up_where_others_are_full():
    counts = allocate(
        20,
        ranks={"clip": 1, "eva": 1e-3},
        available={"clip": 10, "eva": 64},
        multiple_of={"eva": 16},
    )
    assert counts == {"clip": 4, "eva": 16}


def test_allocate_leaves_no_encoder_without_a_token():
    ranks, available = (
        {"clip": 1e-3, "pix2struct": 50.0, "eva": 1e-3},
        dict.fromkeys(("clip", "pix2struct", "eva"), 64),
    )
    counts = allocate(60, ranks=ranks, available=available, multiple_of={"eva": 16})
    assert counts == {"clip": 1, "pix2struct": 43, "eva": 16}
    assert allocate(1, ranks=ranks, available=available) == {"clip": 0, "pix2struct": 1, "eva": 0}


def test_allocate_errors():
    with pytest.raises(ValueError, match=r"between 0 and 181 tokens.*got 182"):
        allocate(182, ranks=RANKS, available=AVAILABLE)
    with pytest.raises(ValueError, match="none for pix2struct"):
        allocate(9, ranks={"clip": 1.0, "convnext": 1.0}, available=AVAILABLE)
    with pytest.raises(ValueError, match="more than 0 for clip"):
        allocate(9, ranks=RANKS | {"clip": 0.0}, available=AVAILABLE)
    with pytest.raises(ValueError, match="expected one of rank"):
        allocate(9, ranks=RANKS, available=AVAILABLE, assignment="ranks")
    with pytest.raises(ValueError, match="multiples of 16"):
        allocate(20, ranks={"eva": 1.0}, available={"eva": 64}, multiple_of={"eva": 16})


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_token_that_is_not_finite_is_dropped_first(bad):
    x = np.insert(SIX, 2, [[bad, 1.0]], axis=1)
    raster = np.arange(7, dtype=np.int32)[None]
    _, kept = cut_tokens(jnp.asarray(x), jnp.asarray(raster), cut=EncoderCut(4))
    np.testing.assert_array_equal(kept, [[3, 4, 5, 6]])  # those of SIX alone
    _, kept = cut_tokens(jnp.asarray(x), jnp.asarray(raster), cut=EncoderCut(6))
    np.testing.assert_array_equal(kept, [[0, 1, 3, 4, 5, 6]])
