"""What every encoder promises, whatever its architecture."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.encoders.clip.model import Clip, ClipConfig
from meteor_jax.models.encoders.convnext.model import ConvNext, ConvNextConfig
from meteor_jax.models.encoders.pix2struct.model import Pix2Struct, Pix2StructConfig
from tests.encoder_steps import segment_steps

MODELS = {
    "clip": Clip(
        ClipConfig(image_size=24, patch_size=4, width=16, depth=4, num_heads=2, mlp_dim=24)
    ),
    "clip_with_cls": Clip(  # two blocks: one of its three segments is empty
        ClipConfig(
            image_size=24, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=24, keep_cls=True
        )
    ),
    "convnext": ConvNext(
        ConvNextConfig(image_size=48, depths=(1, 2), widths=(8, 16), layer_scale_init=0.5)
    ),
    "pix2struct": Pix2Struct(
        Pix2StructConfig(
            grid_side=6, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=24, num_positions=8
        )
    ),
}
NUM_TOKENS = 36
NUM_IMAGES = 3


def images(seed=0):
    return np.random.default_rng(seed).normal(size=(NUM_IMAGES, 32, 32, 3)).astype(np.float32)


@functools.cache
def variables(name):
    """Every parameter drawn at random; quicker than compiling `init`."""
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), images())
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: random.normal(scale=0.5, size=leaf.shape).astype(leaf.dtype), shapes
    )


def steps_for(name, keeps=(30, 20, 9), methods=("mean_token", "attention", "attention")):
    """Three steps, or, where tokens can be dropped at the end only, the last by mean token."""
    if not all(MODELS[name].config.prunable):
        keeps, methods = (NUM_TOKENS, NUM_TOKENS, keeps[-1]), "mean_token"
    return segment_steps(keeps, methods)


@functools.cache
def compiled(name, steps):
    return jax.jit(functools.partial(MODELS[name].apply, steps=steps))


def encode(name, steps=(), x=None):
    return compiled(name, steps)(variables(name), images() if x is None else x)


@pytest.mark.parametrize("name", MODELS)
class TestEncoder:
    def test_config_tells_the_shape(self, name):
        config = MODELS[name].config
        out = encode(name)
        assert out.x.shape == (NUM_IMAGES, config.num_tokens, config.width)
        assert config.num_tokens == config.grid**2 == NUM_TOKENS
        assert config.num_windows == 1
        assert out.kept == ()
        np.testing.assert_array_equal(out.patch_index, [np.arange(NUM_TOKENS)] * NUM_IMAGES)

    def test_keeping_everything_changes_nothing(self, name):
        kept = encode(name, steps_for(name, keeps=(NUM_TOKENS,) * 3))
        full = encode(name)
        np.testing.assert_array_equal(kept.x, full.x)
        np.testing.assert_array_equal(kept.patch_index, full.patch_index)

    def test_steps_shorten_and_keep_order(self, name):
        steps = steps_for(name)
        out = encode(name, steps)
        assert out.x.shape == (NUM_IMAGES, 9, MODELS[name].config.width)
        assert [kept.shape for kept in out.kept] == [(NUM_IMAGES, step.keep) for step in steps]
        np.testing.assert_array_equal(out.kept[-1], out.patch_index)
        assert (np.diff(np.asarray(out.patch_index), axis=1) > 0).all()
        for before, after in itertools.pairwise(out.kept):
            for old, new in zip(np.asarray(before), np.asarray(after), strict=True):
                assert set(new) <= set(old)

    def test_patch_index_travels_with_its_token(self, name):
        """A step at the end only: each kept token is the unpruned model's token at that place."""
        out = encode(name, steps_for(name, (NUM_TOKENS, NUM_TOKENS, 9), "mean_token"))
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

    def test_gradients_reach_every_parameter(self, name):
        def loss(variables):
            return (MODELS[name].apply(variables, images()).x ** 2).sum()

        grads = jax.jit(jax.grad(loss))(variables(name))
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            assert np.isfinite(grad).all(), path
            assert np.abs(grad).max() > 0, path

    def test_dtype_and_remat_reach_the_blocks(self, name):
        config = dataclasses.replace(MODELS[name].config, remat="nothing_saveable")
        model = MODELS[name].clone(config=config, dtype=jnp.bfloat16)
        program = jax.make_jaxpr(functools.partial(model.apply, steps=steps_for(name)))(
            variables(name), images()
        )
        assert program.out_avals[0].dtype == jnp.bfloat16
        assert "checkpoint" in str(program) or "remat" in str(program)

    def test_bad_steps(self, name):
        with pytest.raises(ValueError, match="37 of 36"):
            encode(name, steps_for(name, keeps=(36, 36, 37)))


def num_parameters(model):
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_full_sizes():
    """Millions of parameters of the published models, in their PyTorch checkpoints."""
    unused = 4 * 1024  # CLIP: class embedding, its position, the norm after the blocks
    assert round((num_parameters(Clip(ClipConfig())) + unused) / 1e6, 1) == 303.5
    head = 2 * 3072 + 1000 * 3072 + 1000  # ConvNeXt: classifier and its norm
    assert round((num_parameters(ConvNext(ConvNextConfig())) + head) / 1e6, 1) == 846.5
    assert round(num_parameters(Pix2Struct(Pix2StructConfig())) / 1e6, 1) == 512.8
    assert [c.num_tokens for c in (ClipConfig(), ConvNextConfig(), Pix2StructConfig())] == [
        576,
        1024,
        2025,
    ]
    assert [c.width for c in (ClipConfig(), ConvNextConfig(), Pix2StructConfig())] == [
        1024,
        3072,
        1536,
    ]
