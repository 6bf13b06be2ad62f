"""What encoders with window attention promise, and the windows themselves."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.encoders.eva02.model import Eva02, Eva02Config
from meteor_jax.models.encoders.sam.model import Sam, SamConfig
from meteor_jax.models.layers import windows
from meteor_jax.models.layers.attention import attend
from meteor_jax.models.layers.windows import (
    attend_windows,
    contiguous_runs,
    from_windows,
    to_windows,
)
from meteor_jax.pruning.encoder_steps import EncoderStep
from meteor_jax.pruning.method import ReductionContext
from meteor_jax.pruning.ops.windows import window_order, window_quotas
from meteor_jax.pruning.points import Point
from tests.encoder_steps import METHODS, segment_steps

MODELS = {
    "eva02": Eva02(
        Eva02Config(
            image_size=32,
            patch_size=4,
            width=16,
            depth=4,
            num_heads=2,
            mlp_dim=20,
            window=4,
            position_side=3,
        )
    ),
    # 10×10 tokens, 5×5 groups: windows of 4, 4, 2, 4, 4, 2, 2, 2 and 1 groups.
    "sam": Sam(
        SamConfig(
            image_size=40,
            patch_size=4,
            block_width=16,
            depth=4,
            num_heads=2,
            mlp_dim=20,
            window=4,
            global_blocks=(1, 3),
            neck_width=5,
        )
    ),
}
# Tokens kept at each boundary, and in each window at the last.
KEEPS = {"eva02": (40, 20, 12), "sam": (20, 13, 7)}
QUOTAS = {"eva02": (3, 3, 3, 3), "sam": (1, 1, 1, 1, 1, 1, 1, 0, 0)}


def images(seed=0):
    return np.random.default_rng(seed).normal(size=(3, 36, 36, 3)).astype(np.float32)


@functools.cache
def variables(name):
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), images())
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: random.normal(scale=0.5, size=leaf.shape).astype(leaf.dtype), shapes
    )


def steps_for(name, keeps=None, method="attention"):
    return segment_steps(keeps or KEEPS[name], method)


@functools.cache
def compiled(name, steps):
    return jax.jit(functools.partial(MODELS[name].apply, steps=steps))


def encode(name, steps=(), x=None):
    x = images() if x is None else x
    context = ReductionContext(image_seed=np.arange(len(x), dtype=np.uint32))
    return compiled(name, steps)(variables(name), x, context=context)


def keep_all(name):
    return steps_for(name, (MODELS[name].config.num_tokens,) * 3)


def window_of(name, patch_index):
    grid = MODELS[name].config.grid
    side = {"eva02": 4, "sam": 2}[name]
    return patch_index // grid // side * -(-grid // side) + patch_index % grid // side


@pytest.mark.parametrize("name", MODELS)
class TestEncoder:
    def test_config_tells_the_shape(self, name):
        config, out = MODELS[name].config, encode(name)
        assert out.x.shape == (3, config.num_tokens, config.width)
        assert config.num_tokens == config.grid**2
        assert out.kept == ()
        np.testing.assert_array_equal(out.patch_index, [np.arange(config.num_tokens)] * 3)

    def test_keeping_everything_changes_nothing(self, name):
        kept, full = encode(name, keep_all(name)), encode(name)
        np.testing.assert_array_equal(kept.x, full.x)
        np.testing.assert_array_equal(kept.patch_index, full.patch_index)

    def test_patch_index_travels_with_its_token(self, name):
        """A step at the end only: each kept token is the unpruned model's token at that place."""
        keeps = (MODELS[name].config.num_tokens,) * 2 + KEEPS[name][-1:]
        out = encode(name, steps_for(name, keeps))
        full = np.asarray(encode(name).x)
        expected = np.take_along_axis(full, np.asarray(out.patch_index)[..., None], axis=1)
        np.testing.assert_allclose(out.x, expected, atol=1e-5)

    def test_tree_does_not_depend_on_steps(self, name):
        init = functools.partial(MODELS[name].init, steps=steps_for(name))
        pruned = jax.eval_shape(init, jax.random.key(0), images())
        assert jax.tree.map(lambda leaf: leaf.shape, pruned) == jax.tree.map(
            lambda leaf: leaf.shape, variables(name)
        )

    def test_image_does_not_depend_on_its_batch_mates(self, name):
        mates = images(seed=7)
        mates[1] = images()[1]
        ours, theirs = encode(name, steps_for(name)), encode(name, steps_for(name), mates)
        np.testing.assert_array_equal(ours.patch_index[1], theirs.patch_index[1])
        np.testing.assert_allclose(ours.x[1], theirs.x[1], atol=1e-5)
        assert (ours.patch_index != theirs.patch_index).any()

    def test_compiles_once(self, name):
        for seed in range(3):
            encode(name, steps_for(name), images(seed))
        assert compiled(name, steps_for(name))._cache_size() == 1

    def test_gradients_reach_every_parameter_through_the_kept_tokens(self, name):
        def loss(params):
            out = MODELS[name].apply({"params": params}, images(), steps=steps_for(name))
            return (out.x**2).sum()

        grads = jax.jit(jax.grad(loss))(variables(name)["params"])
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            place = jax.tree_util.keystr(path, simple=True, separator="/")
            assert np.isfinite(grad).all(), place
            assert (np.abs(grad).max() > 0) != ("tables" in place), place

    def test_dtype_and_remat_reach_the_blocks(self, name):
        config = dataclasses.replace(MODELS[name].config, remat="nothing_saveable")
        model = MODELS[name].clone(config=config, dtype=jnp.bfloat16)
        program = jax.make_jaxpr(functools.partial(model.apply, steps=steps_for(name)))(
            variables(name), images()
        )
        assert program.out_avals[0].dtype == jnp.bfloat16
        assert "checkpoint" in str(program) or "remat" in str(program)

    def test_bad_steps(self, name):
        most = MODELS[name].config.num_tokens
        with pytest.raises(ValueError, match=r"no reduction point encoder\.block1"):
            encode(name, (EncoderStep(Point("encoder", "block", 1), 4, METHODS["attention"]),))
        with pytest.raises(ValueError, match=f"cannot keep {most + 4} of {most}"):
            encode(name, steps_for(name, (most, most, most + 4)))
        with pytest.raises(ValueError, match="has none; or use queries='all'"):
            encode(name, steps_for(name, method="cls"))


@pytest.mark.parametrize("method", ["attention", "mean_token", "random", "uniform"])
@pytest.mark.parametrize("name", MODELS)
def test_every_window_keeps_its_quota(name, method):
    steps = steps_for(name, method=method)
    out = encode(name, steps)
    assert out.x.shape == (3, KEEPS[name][-1], MODELS[name].config.width)
    assert [kept.shape for kept in out.kept] == [(3, step.keep) for step in steps]
    assert [f.shape[:2] for f in out.features] == [(3, step.keep) for step in steps]
    np.testing.assert_array_equal(out.kept[-1], out.patch_index)
    for kept in out.kept:
        assert (np.diff(np.asarray(kept), axis=1) > 0).all()
    for before, after in itertools.pairwise(np.asarray(kept) for kept in out.kept):
        for old, new in zip(before, after, strict=True):
            assert set(new) <= set(old)
    for patch_index in np.asarray(out.patch_index):
        held = np.bincount(window_of(name, patch_index), minlength=len(QUOTAS[name]))
        np.testing.assert_array_equal(held, QUOTAS[name])


def test_order_of_a_grid_that_windows_do_not_divide():
    order, sizes = window_order(3, 2)
    np.testing.assert_array_equal(order, [0, 1, 3, 4, 2, 5, 6, 7, 8])
    assert sizes == (4, 2, 2, 1)


def test_quotas():
    assert window_quotas(9, (4, 2, 2, 1)) == (4, 2, 2, 1)
    # 2.22, 1.11, 1.11, 0.56: the last has the largest remainder.
    assert window_quotas(5, (4, 2, 2, 1)) == (2, 1, 1, 1)
    assert window_quotas(8, (4, 4, 4, 4)) == (2, 2, 2, 2)
    random = np.random.default_rng(0)
    for _ in range(100):
        sizes = tuple(map(int, random.integers(1, 50, size=25)))
        keep = int(random.integers(1, sum(sizes) + 1))
        quotas = window_quotas(keep, sizes)
        assert sum(quotas) == keep
        assert all(quota <= size for quota, size in zip(quotas, sizes, strict=True))
    with pytest.raises(ValueError, match="cannot keep 10 of 9 tokens"):
        window_quotas(10, (4, 2, 2, 1))


def test_full_sizes():
    """Millions of parameters of the published models, and how many tokens come out."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    for model, millions, num_tokens in (
        (Eva02(Eva02Config()), 303.39, 4096),
        (Sam(SamConfig()), 307.69, 1024),
    ):
        shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        shapes.pop("tables", None)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert round(count / 1e6, 2) == millions
        assert (model.config.num_tokens, model.config.width) == (num_tokens, 1024)


def test_sams_windows_at_full_size():
    """16 whole windows, 8 cut off at one side, 1 at both, in groups of four tokens."""
    config = SamConfig()
    _, sizes = window_order(config.grid, config.window // 2)
    assert sorted(sizes) == [16] + [28] * 8 + [49] * 16


def test_to_windows_and_back():
    x = jnp.arange(1.0, 19.0).reshape(1, 9, 2)
    slots = to_windows(x, sizes=(4, 2, 2, 1), length=4)
    np.testing.assert_array_equal(
        slots[0, :, :, 0], [[1, 3, 5, 7], [9, 11, 0, 0], [13, 15, 0, 0], [17, 0, 0, 0]]
    )
    np.testing.assert_array_equal(from_windows(slots, sizes=(4, 2, 2, 1)), x)


def test_stretches():
    assert list(contiguous_runs(0, 7, global_blocks=(2, 5))) == [
        (0, 2, False),
        (2, 3, True),
        (3, 5, False),
        (5, 6, True),
        (6, 7, False),
    ]
    assert list(contiguous_runs(2, 2, global_blocks=(2,))) == [(2, 2, True)]


def test_long_windows_attend_in_chunks(monkeypatch):
    """Forward and backward, with queries left over after the whole chunks."""
    monkeypatch.setattr(windows, "LONG", 10)
    monkeypatch.setattr(windows, "CHUNK", 8)
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 2, 27, 3, 4)).astype(np.float32)
    v = v[..., :2]

    def whole(q, k, v):
        return attend(*(x.reshape(4, *x.shape[2:]) for x in (q, k, v))).reshape(v.shape)

    def value_and_grad(function):
        def loss(q, k, v):
            out = function(q, k, v)
            return (out**2).sum(), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)

    (_, ours), our_grads = jax.jit(value_and_grad(attend_windows))(q, k, v)
    (_, theirs), their_grads = jax.jit(value_and_grad(whole))(q, k, v)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for one, other in zip(our_grads, their_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert "27,27]" not in str(jax.make_jaxpr(value_and_grad(attend_windows))(q, k, v))
