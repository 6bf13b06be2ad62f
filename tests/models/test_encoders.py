"""What every encoder promises, whatever its architecture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.clip import Clip, ClipConfig
from meteor_jax.models.convnext import ConvNext, ConvNextConfig
from meteor_jax.models.pix2struct import Pix2Struct, Pix2StructConfig
from meteor_jax.pruning.encode import EncoderCut

MODELS = {
    "clip": Clip(
        ClipConfig(image_size=24, patch_size=4, width=16, depth=4, num_heads=2, mlp_dim=24)
    ),
    "clip_with_cls": Clip(
        ClipConfig(
            image_size=24, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=24, keep_cls=True
        )
    ),
    "clip_of_two_blocks": Clip(
        ClipConfig(image_size=24, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=24)
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


@pytest.fixture(scope="module")
def variables():
    return {name: init(model, None) for name, model in MODELS.items()}


def init(model, cuts):
    return jax.jit(lambda key, x: model.init(key, x, cuts=cuts))(jax.random.key(1), images(1))


def images(num_images, seed=0):
    return jax.random.normal(jax.random.key(seed), (num_images, 32, 32, 3))


def cuts_for(model, keeps=(30, 20, 9), criteria=("mean_token", "attention", "attention")):
    """Three cuts, or, where only the output can be cut, the last by mean token."""
    if not all(model.config.cuttable):
        keeps, criteria = (NUM_TOKENS, NUM_TOKENS, keeps[-1]), ("mean_token",) * 3
    return tuple(EncoderCut(k, c) for k, c in zip(keeps, criteria, strict=True))


def encode(model, variables, x, cuts):
    return jax.jit(lambda variables, x: model.apply(variables, x, cuts=cuts))(variables, x)


@pytest.mark.parametrize("name", MODELS)
class TestEncoder:
    def test_config_tells_the_shape(self, name, variables):
        model = MODELS[name]
        out = encode(model, variables[name], images(2), None)
        assert out.x.shape == (2, model.config.num_tokens, model.config.width)
        assert model.config.num_tokens == model.config.grid**2 == NUM_TOKENS
        assert model.config.num_windows == 1
        assert out.kept == ()
        np.testing.assert_array_equal(out.raster, [np.arange(NUM_TOKENS)] * 2)

    def test_keeping_everything_changes_nothing(self, name, variables):
        model = MODELS[name]
        full = encode(model, variables[name], images(2), None)
        cuts = cuts_for(model, keeps=(NUM_TOKENS,) * 3)
        kept = encode(model, variables[name], images(2), cuts)
        np.testing.assert_array_equal(kept.x, full.x)
        np.testing.assert_array_equal(kept.raster, full.raster)

    def test_cuts_shorten_and_keep_order(self, name, variables):
        model = MODELS[name]
        cuts = cuts_for(model)
        out = encode(model, variables[name], images(3), cuts)
        assert out.x.shape == (3, 9, model.config.width)
        assert [kept.shape for kept in out.kept] == [(3, cut.keep) for cut in cuts]
        np.testing.assert_array_equal(out.kept[-1], out.raster)
        assert (np.diff(np.asarray(out.raster), axis=1) > 0).all()
        for before, after in zip(out.kept[:-1], out.kept[1:], strict=True):
            for old, new in zip(np.asarray(before), np.asarray(after), strict=True):
                assert set(new) <= set(old)

    def test_raster_travels_with_its_token(self, name, variables):
        """A cut at the output only: each kept token is the uncut model's token at that place."""
        model = MODELS[name]
        cuts = cuts_for(model, keeps=(NUM_TOKENS, NUM_TOKENS, 9))
        out = encode(model, variables[name], images(2), cuts)
        full = encode(model, variables[name], images(2), None)
        expected = np.take_along_axis(np.asarray(full.x), np.asarray(out.raster)[..., None], 1)
        np.testing.assert_allclose(out.x, expected, atol=1e-5)

    def test_tree_does_not_depend_on_cuts(self, name, variables):
        model = MODELS[name]
        cut = init(model, cuts_for(model))
        jax.tree.map(np.testing.assert_array_equal, cut, variables[name])

    def test_image_does_not_depend_on_its_batch_mates(self, name, variables):
        model = MODELS[name]
        together = encode(model, variables[name], images(4), cuts_for(model))
        alone = encode(model, variables[name], images(4)[2:3], cuts_for(model))
        np.testing.assert_array_equal(together.raster[2:3], alone.raster)
        np.testing.assert_allclose(together.x[2:3], alone.x, atol=1e-5)

    def test_compiles_once(self, name, variables):
        model = MODELS[name]
        run = jax.jit(lambda variables, x: model.apply(variables, x, cuts=cuts_for(model)))
        rasters = {np.asarray(run(variables[name], images(1, seed)).raster).tobytes()
                   for seed in range(4)}
        assert run._cache_size() == 1
        assert len(rasters) > 1  # the images really differ in what they keep

    def test_gradients_reach_every_parameter(self, name, variables):
        model = MODELS[name]

        def loss(variables):
            return (model.apply(variables, images(2), cuts=cuts_for(model)).x ** 2).sum()

        grads = jax.jit(jax.grad(loss))(variables[name])
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            assert np.isfinite(grad).all(), path
            assert np.abs(grad).max() > 0, path

    def test_bfloat16(self, name, variables):
        model = MODELS[name].clone(dtype=jnp.bfloat16)
        out = encode(model, variables[name], images(2), cuts_for(model))
        assert out.x.dtype == jnp.bfloat16
        full32 = encode(MODELS[name], variables[name], images(2), None).x
        full16 = encode(model, variables[name], images(2), None).x.astype(jnp.float32)
        assert np.abs(full16 - full32).max() < 0.1 * np.abs(full32).max()

    def test_remat_changes_no_number(self, name, variables):
        model = MODELS[name]
        config = type(model.config)(**{**vars(model.config), "remat": "nothing_saveable"})

        def loss(variables, model):
            return (model.apply(variables, images(2)).x ** 2).sum()

        grad = jax.jit(jax.grad(loss), static_argnums=1)
        plain = grad(variables[name], model)
        remat = grad(variables[name], model.clone(config=config))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
                     plain, remat)

    def test_bad_cuts(self, name, variables):
        model = MODELS[name]
        with pytest.raises(ValueError, match="expected 3, one a segment, got 1"):
            encode(model, variables[name], images(1), (EncoderCut(4),))
        with pytest.raises(ValueError, match="37 of 36"):
            encode(model, variables[name], images(1), cuts_for(model, keeps=(36, 36, 37)))


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
        576, 1024, 2025,
    ]
    assert [c.width for c in (ClipConfig(), ConvNextConfig(), Pix2StructConfig())] == [
        1024, 3072, 1536,
    ]
