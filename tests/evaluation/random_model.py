"""The real model, as small as it gets, with random parameters, and a folder that holds it.

`python -m tests.evaluation.random_model DATA_DIR WORKDIR PORT PROCESS` evaluates it on a benchmark
as one of two processes.
"""

import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from meteor_jax.checkpoint import open_checkpoints, write_config
from meteor_jax.evaluation.evaluator import evaluate_checkpoint
from meteor_jax.experiment.config import load_experiment
from meteor_jax.inference.layout import param_shapes
from meteor_jax.models.eagle.family import Eagle
from meteor_jax.parallel.distributed import start_processes
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.parallel.rules import parameter_shardings


def config(data_dir, **changes):
    return {
        "model": {
            "encoders": {
                "clip": {
                    "image_size": 32,
                    "patch_size": 8,
                    "width": 16,
                    "depth": 1,
                    "num_heads": 2,
                    "mlp_dim": 32,
                },
                "pix2struct": {
                    "grid_side": 3,
                    "patch_size": 8,
                    "width": 16,
                    "depth": 1,
                    "num_heads": 2,
                    "mlp_dim": 32,
                    "num_positions": 8,
                },
            },
            "llama": {
                "depth": 2,
                "width": 32,
                "num_heads": 2,
                "num_kv_heads": 2,
                "mlp_dim": 32,
                "vocab_size": 259,
            },
            "image_size": 32,
        },
        "data": {
            "sources": ("easy-vqa",),
            "image_size": 32,
            "text_length": 96,
            "data_dir": str(data_dir),
        },
        "train": {"finetune": {"steps": 1, "template": "qa"}},
        "plans": {"cut": "fastv(layer=1, keep=6)"},
        "eval": {
            "num_images": 7,
            "max_new_tokens": 3,
            "encode_batch_size": 2,
            "batch_size": 16,
            "visual_cache_images": 4,
            "num_visualizations": 2,
        },
    } | changes


def png(index):
    """Noise, another one for each index."""
    pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def make_params(experiment):
    """Random ones, large enough that image and question change the answer, which is letters."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    shapes = param_shapes(experiment, mesh=mesh)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    drawn = jax.tree.map(
        lambda leaf: (
            (1.2 if len(leaf.shape) > 1 else 0.3)
            * jax.random.normal(next(keys), leaf.shape, leaf.dtype)
        ),
        shapes,
    )
    head = drawn["llama"]["head"]["kernel"]
    letters = jnp.zeros(head.shape[1]).at[97:123].set(0.25)
    drawn["llama"]["head"]["kernel"] = head * letters
    return drawn


def save_run(folder: Path, values) -> None:
    """What evaluation reads of a trained run: config.json and the parameters of step 7."""
    params = make_params(load_experiment(values))
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, json.loads(json.dumps(values)))
    with open_checkpoints(folder) as checkpoints:
        checkpoints.save(7, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))


def evaluate(data_dir, workdir, *, mesh=None):
    """POPE and MMMU, which has questions about two images, under two plans."""
    values = config(data_dir)
    values["eval"] |= {
        "prompt_lengths": (256,),
        "max_new_tokens_limit": 3,
        "num_images": None,
        "encode_batch_size": 4,
        "batch_size": 8,
    }
    experiment = load_experiment(values)
    params = make_params(experiment)
    options = {"tasks": ("pope", "mmmu_val"), "plans": ("full", "cut"), "display": "quiet"}
    if mesh is None:
        return evaluate_checkpoint(experiment, params, workdir=workdir, **options)

    def place(leaf, sharding):
        whole = jax.device_get(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index])

    params = jax.tree.map(
        place,
        params,
        parameter_shardings(params, mesh, rules=Eagle(experiment.model).sharding_rules),
    )
    with jax.set_mesh(mesh):
        return evaluate_checkpoint(experiment, params, workdir=workdir, **options)


def main(data_dir, workdir, port, process):
    start_processes(coordinator=f"localhost:{port}", num_processes=2, process_id=int(process))
    evaluate(data_dir, workdir, mesh=make_mesh(MeshConfig(data=2, fsdp=-1)))


if __name__ == "__main__":
    main(*sys.argv[1:])
