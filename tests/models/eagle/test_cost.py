"""The encoders' closed formulas against the programs that they are formulas of."""

import functools

import jax
import jax.numpy as jnp
import pytest

from meteor_jax.models.eagle.cost import (
    count_traced,
    encoder_flops,
    encoder_score_flops,
    resize_flops,
)
from meteor_jax.models.encoders.clip.model import Clip, ClipConfig
from meteor_jax.models.encoders.convnext import model as convnext
from meteor_jax.models.encoders.convnext.model import ConvNext, ConvNextConfig
from meteor_jax.models.encoders.eva02.model import Eva02, Eva02Config
from meteor_jax.models.encoders.pix2struct.model import Pix2Struct, Pix2StructConfig
from meteor_jax.models.encoders.sam.model import Sam, SamConfig
from meteor_jax.pruning.encode import EncoderCut

# Full size: the formulas hold there, chunks of long windows and all, and tracing is quick.
MODELS = {
    "clip": Clip(ClipConfig()),
    "convnext": ConvNext(ConvNextConfig()),
    "eva02": Eva02(Eva02Config()),
    "pix2struct": Pix2Struct(Pix2StructConfig()),
    "sam": Sam(SamConfig()),
}
KEEPS = {
    "clip": (400, 150, 40),
    "convnext": (1024, 1024, 300),
    "eva02": (3008, 1600, 416),  # 3,008 are a long window that no number of whole chunks makes
    "pix2struct": (2025, 900, 300),
    "sam": (700, 301, 100),
}


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_traced_program(name, cut, monkeypatch):
    monkeypatch.setattr(convnext, "depthwise", convnext.depthwise_conv)  # a form that is counted
    model = MODELS[name]
    config = model.config
    criteria = ("mean_token",) + ("attention" if config.has_attention else "mean_token",) * 2
    cuts = tuple(map(EncoderCut, KEEPS[name], criteria)) if cut else None
    image = jax.ShapeDtypeStruct((1, 1024, 1024, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    traced = count_traced(functools.partial(model.apply, cuts=cuts), variables, image)
    resizing = resize_flops(1024, config.image_size)
    if name == "eva02":
        resizing += resize_flops(config.position_side, config.grid, channels=config.width)
    assert traced == encoder_flops(config, cuts) + encoder_score_flops(config, cuts) + resizing


def test_the_papers_table():
    """TFLOPs of the encoders as METEOR's table has them, the patch embedding left out."""

    def tera(config):
        patch = 2 * config.num_tokens * config.patch_size**2 * 3 * config.width
        return round((encoder_flops(config, None) - patch) / 1e12, 3)

    assert tera(ClipConfig()) == 0.381
    assert tera(Eva02Config()) == 3.092
