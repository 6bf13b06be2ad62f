"""The real model, as small as it gets, with random parameters, and a folder that holds it."""

import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from meteor_jax.checkpoint import open_checkpoints, write_config
from meteor_jax.evaluation.runner import param_shapes
from meteor_jax.parallel import MeshConfig, make_mesh
from meteor_jax.training.experiment import load_experiment


def config(data_dir, **changes):
    return {
        "model": {
            "encoders": ("clip", "pix2struct"),
            "clip": {"image_size": 32, "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2,
                     "mlp_dim": 32},
            "pix2struct": {"grid_side": 3, "patch_size": 8, "width": 16, "depth": 1,
                           "num_heads": 2, "mlp_dim": 32, "num_positions": 8},
            "llama": {"depth": 2, "width": 32, "num_heads": 2, "num_kv_heads": 2, "mlp_dim": 32,
                      "vocab_size": 259},
            "image_size": 32,
        },
        "data": {"sources": ("easy-vqa",), "image_size": 32, "text_length": 96,
                 "data_dir": str(data_dir)},
        "train": {"finetune": {"steps": 1, "template": "qa"}},
        "plans": {"cut": "fastv(layer=1, keep=6)"},
        "eval": {"num_images": 7, "max_new_tokens": 3, "images_per_batch": 2,
                 "questions_per_batch": 16, "group_images": 4, "draw_images": 2},
    } | changes


def png(index):
    """Noise, another one for each index."""
    pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def make_params(experiment):
    """Random ones whose answers are letters, so that they can be told apart."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    shapes = param_shapes(experiment, mesh=mesh)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    drawn = jax.tree.map(
        lambda leaf: 0.3 * jax.random.normal(next(keys), leaf.shape, leaf.dtype), shapes
    )
    head = drawn["llama"]["head"]["kernel"]
    letters = jnp.zeros(head.shape[1]).at[97:123].set(1)
    drawn["llama"]["head"]["kernel"] = head * letters
    return drawn


def save_run(folder: Path, values) -> None:
    """What evaluation reads of a trained run: config.json and the parameters of step 7."""
    params = make_params(load_experiment(values))
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, json.loads(json.dumps(values)))
    with open_checkpoints(folder) as checkpoints:
        checkpoints.save(7, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
