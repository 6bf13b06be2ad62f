"""The encoders against a tiny EAGLE of random weights, computed by its PyTorch code.

`encoders_tiny.npz` holds, by tower, the weights under their PyTorch names and the tower's output
for the image that `master_image` makes.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.encoders.clip.model import Clip, ClipConfig
from meteor_jax.models.encoders.convnext.model import ConvNext, ConvNextConfig
from meteor_jax.models.encoders.pix2struct.model import Pix2Struct, Pix2StructConfig
from meteor_jax.models.layers.resize import resize

GOLDEN = Path(__file__).parents[2] / "golden" / "encoders_tiny.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def tower(golden, name):
    return {k.removeprefix(f"{name}/"): v for k, v in golden.items() if k.startswith(f"{name}/")}


def master_image():
    """float32[1, 1024, 1024, 3]."""
    y, x, c = np.meshgrid(np.arange(1024.0), np.arange(1024.0), np.arange(3.0), indexing="ij")
    image = np.sin(0.013 * (c + 1) * x + 0.7 * c) * np.cos(0.017 * (c + 1) * y)
    image += 0.5 * np.sin(0.11 * (x + 2 * y) + c)
    image += 0.25 * np.cos(0.37 * x - 0.29 * y * (c + 1))
    return jnp.asarray(image[None], jnp.float32)


def dense(weights, name):
    params = {"kernel": weights[f"{name}.weight"].T}
    if f"{name}.bias" in weights:
        params["bias"] = weights[f"{name}.bias"]
    return params


def patches(weights, name):
    """A convolution whose stride is its size: [out, in, y, x] → [y · x · in, out]."""
    kernel = weights[f"{name}.weight"]
    params = {"kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])}
    if f"{name}.bias" in weights:
        params["bias"] = weights[f"{name}.bias"]
    return params


def norm(weights, name):
    params = {"scale": weights[f"{name}.weight"]}
    if f"{name}.bias" in weights:
        params["bias"] = weights[f"{name}.bias"]
    return params


def stack(blocks):
    return {"stack": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}


def clip_params(w):
    def block(i):
        at = f"vision_model.encoder.layers.{i}"
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        return {
            "norm1": norm(w, f"{at}.layer_norm1"),
            "attention": {ours: dense(w, f"{at}.self_attn.{n}") for ours, n in names.items()},
            "norm2": norm(w, f"{at}.layer_norm2"),
            "mlp": {name: dense(w, f"{at}.mlp.{name}") for name in ("fc1", "fc2")},
        }

    return {
        "patch_embedding": patches(w, "vision_model.embeddings.patch_embedding"),
        "position_embedding": w["vision_model.embeddings.position_embedding.weight"][1:],
        "pre_norm": norm(w, "vision_model.pre_layrnorm"),
        "blocks": stack([block(0), block(1)]),
    }


def convnext_params(w, depths):
    def block(stage, i):
        at = f"stages.{stage}.blocks.{i}"
        return {
            "depthwise": {
                "kernel": w[f"{at}.conv_dw.weight"].transpose(2, 3, 1, 0),
                "bias": w[f"{at}.conv_dw.bias"],
            },
            "norm": norm(w, f"{at}.norm"),
            "fc1": dense(w, f"{at}.mlp.fc1"),
            "fc2": dense(w, f"{at}.mlp.fc2"),
            "layer_scale": w[f"{at}.weight"],
        }

    params = {"stem": patches(w, "stem.0"), "stem_norm": norm(w, "stem.1")}
    for stage, depth in enumerate(depths):
        params[f"stage{stage}"] = stack([block(stage, i) for i in range(depth)])
        if stage:
            params[f"downsample{stage}_norm"] = norm(w, f"stages.{stage}.downsample.0")
            params[f"downsample{stage}"] = patches(w, f"stages.{stage}.downsample.1")
    return params


def pix2struct_params(w):
    def block(i):
        at = f"encoder.layer.{i}"
        attention = {"query": "query", "key": "key", "value": "value", "out": "output"}
        mlp = {"gate": "wi_0", "up": "wi_1", "out": "wo"}
        return {
            "norm1": norm(w, f"{at}.pre_attention_layer_norm"),
            "attention": {ours: dense(w, f"{at}.attention.{n}") for ours, n in attention.items()},
            "norm2": norm(w, f"{at}.pre_mlp_layer_norm"),
            "mlp": {ours: dense(w, f"{at}.mlp.{n}") for ours, n in mlp.items()},
        }

    return {
        "patch_embedding": dense(w, "embeddings.patch_projection"),
        "row_embedding": w["embeddings.row_embedder.weight"],
        "column_embedding": w["embeddings.column_embedder.weight"],
        "blocks": stack([block(0), block(1)]),
        "final_norm": norm(w, "layernorm"),
    }


def encode(model, params):
    """Runs the model on the master image, after a check that `params` is exactly its tree."""
    image = master_image()
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    return jax.jit(model.apply)({"params": params}, image).x


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_clip(golden):
    weights = tower(golden, "clip")
    config = ClipConfig(width=32, depth=2, num_heads=2, mlp_dim=64)
    assert_close(encode(Clip(config), clip_params(weights)), weights["output"])


def test_convnext(golden):
    weights = tower(golden, "convnext")
    config = ConvNextConfig(depths=(1, 1, 2, 1), widths=(8, 16, 32, 64))
    params = convnext_params(weights, config.depths)
    assert_close(encode(ConvNext(config), params), weights["output"])


def test_pix2struct(golden):
    """EAGLE resizes this tower's 45×45 tokens to 32×32 inside the tower; the encoder does not."""
    weights = tower(golden, "pix2struct")
    config = Pix2StructConfig(width=32, depth=2, num_heads=2, mlp_dim=48, num_positions=64)
    x = encode(Pix2Struct(config), pix2struct_params(weights))
    assert x.shape == (1, 45 * 45, 32)
    x = resize(x.reshape(1, 45, 45, 32), size=32, method="bilinear_align_corners")
    assert_close(x, weights["output"].transpose(0, 2, 3, 1))
