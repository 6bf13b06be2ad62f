"""The one top-k: order, ties, what is not finite, and where it runs on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meteor_jax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh
from meteor_jax.perf.aot import open_topology
from meteor_jax.pruning.methods.visionzip import merge_rest
from meteor_jax.pruning.ops.merge import density_peaks
from meteor_jax.pruning.ops.select import keep_topk
from tests.compiled import collectives

NAN, INF = np.nan, np.inf


def test_the_highest_scores_stay_in_order():
    selection = keep_topk(jnp.asarray([[0.1, 0.9, 0.3, 0.8, 0.2, 0.7]]), keep=3)
    np.testing.assert_array_equal(selection.idx, [[1, 3, 5]])
    assert selection.valid.all()


def test_of_equal_scores_the_earlier_stays():
    np.testing.assert_array_equal(keep_topk(jnp.zeros((1, 5)), keep=2).idx, [[0, 1]])


@pytest.mark.parametrize("devices", [1, 8])
def test_both_zeros_are_equal(devices):
    scores = jnp.asarray([[-0.0, 0.0, -0.0, -1.0]])
    with jax.set_mesh(make_mesh(MeshConfig(), devices=jax.devices()[:devices])):
        kept = jax.jit(lambda scores: keep_topk(scores, keep=2).idx)(scores)
    np.testing.assert_array_equal(kept, [[0, 1]])


def test_an_invalid_entry_never_comes_before_a_valid_one():
    scores = jnp.asarray([[-jnp.inf, 9.0, -5.0, 8.0]])
    valid = jnp.asarray([[True, False, True, False]])
    selection = keep_topk(scores, keep=3, valid=valid)
    np.testing.assert_array_equal(selection.idx[0, :2], [0, 2])
    np.testing.assert_array_equal(selection.valid, [[True, True, False]])


def test_each_example_keeps_its_own_number():
    scores = jnp.asarray([[4.0, 1.0, 3.0, 2.0]] * 2)
    selection = keep_topk(scores, keep=3, num_keep=jnp.asarray([1, 3]))
    np.testing.assert_array_equal(selection.valid, [[True, False, False], [True, True, True]])
    assert selection.idx[0, 0] == 0
    np.testing.assert_array_equal(selection.idx[1], [0, 2, 3])


def test_too_large_a_budget_is_one_line():
    with pytest.raises(ValueError, match="cannot keep 5 of 4 tokens"):
        keep_topk(jnp.zeros((1, 4)), keep=5)


def test_no_gradient_flows_through_the_scores():
    def kept_sum(scores):
        selection = keep_topk(scores, keep=2)
        return (selection.valid * 1.0).sum() + scores.sum() * 0

    np.testing.assert_array_equal(jax.grad(kept_sum)(jnp.arange(4.0)), np.zeros(4))


@pytest.mark.parametrize("scores", [[NAN, -9.0, INF, -8.0, NAN], [-INF, -9.0, NAN, -8.0, INF]])
def test_what_is_not_finite_loses_against_every_finite_score(scores):
    np.testing.assert_array_equal(keep_topk(jnp.asarray([scores]), keep=2).idx, [[1, 3]])
    valid = jnp.asarray([[True, False, True, True, False]])
    selection = keep_topk(jnp.asarray([scores]), keep=4, valid=valid)
    np.testing.assert_array_equal(selection.idx[0, :3], [0, 2, 3])
    np.testing.assert_array_equal(selection.valid, [[True, True, True, False]])
    first = keep_topk(jnp.asarray([scores]), keep=3, valid=valid, num_keep=jnp.asarray([1]))
    np.testing.assert_array_equal(first.idx[0, 0], 3)


def on_shards(function, *shapes, sizes=(1, 8, 1), devices=None):
    """The compiled text of `function` on 8 devices, every array split by its first dimension."""
    mesh = make_mesh(MeshConfig(*sizes), devices=devices)

    def struct(shape, dtype):
        shards = sizes[0] * sizes[1]
        spec = PartitionSpec(None if shape[0] % shards else BATCH_AXES)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        lowered = jax.jit(function).lower(*(struct(*shape) for shape in shapes))
        return lowered.compile().as_text()


def keep_some(scores, valid, num_keep):
    return keep_topk(scores, keep=5, valid=valid, num_keep=num_keep)


def looped(scores, valid, num_keep):
    def body(carry, _):
        kept = jax.lax.switch(
            carry % 2,
            [
                lambda: keep_some(scores, valid, num_keep),
                lambda: keep_some(-scores, valid, num_keep),
            ],
        )
        return carry + 1, kept

    return jax.lax.scan(body, 0, length=3)


@pytest.mark.parametrize("function", [keep_some, jax.vmap(keep_some), looped])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((16, 66), (1, 8, 1)), ((8, 4, 12), (2, 2, 2)), ((3, 12), (1, 8, 1))],
)
def test_every_device_ranks_its_own_rows(function, shape, sizes):
    arrays = (shape, jnp.float32), (shape, bool), (shape[:-1], jnp.int32)
    assert collectives(on_shards(function, *arrays, sizes=sizes)) == []


@pytest.mark.tpu_compile
def test_every_chip_ranks_its_own_rows():
    pytest.importorskip("libtpu")
    devices = open_topology("v5e:2x4")
    for shape in ((8, 6697), (16, 4, 66)):
        arrays = (shape, jnp.float32), (shape, bool), (shape[:-1], jnp.int32)
        assert collectives(on_shards(keep_some, *arrays, devices=devices)) == []


def test_merging_stays_on_its_shard_too():
    x, row = ((8, 12, 4), jnp.float32), ((8, 12), jnp.float32)
    merge = on_shards(lambda x, scores: merge_rest(x, scores, keep=6, num_merge_targets=2), x, row)

    def peaks(x, valid):
        count = valid.sum(1)
        return density_peaks(x, valid=valid, num_clusters=count, max_clusters=3)

    assert collectives(merge) == collectives(on_shards(peaks, x, ((8, 12), bool))) == []


@pytest.mark.parametrize("num_keep", [None, [3, 0, 7, 9, 1, 2, 9, 5]])
def test_a_mesh_keeps_what_one_device_keeps(num_keep):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (8, 31)).astype(np.float32)  # many are equal
    scores[rng.random(scores.shape) < 0.2] = NAN
    options = {"valid": rng.random(scores.shape) < 0.7}
    if num_keep is not None:
        options["num_keep"] = np.asarray(num_keep)
    expected = keep_topk(scores, keep=9, **options)
    with jax.set_mesh(make_mesh(MeshConfig(1, 8, 1))):
        found = jax.jit(lambda scores, options: keep_topk(scores, keep=9, **options))(
            scores, options
        )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
