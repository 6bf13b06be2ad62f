"""A tiny EAGLE X4 of random weights and what its PyTorch code computes from them, as files.

`eagle_x4_tiny_weights.npz` is its whole state dict, `eagle_x4_tiny_outputs.npz` the outputs for
the image that `master_image` makes and the prompt `input_ids`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent.parent / "golden"
# Heads of 16 channels do not show in the shapes.
OVERRIDES = ("encoders.clip.num_heads=2", "encoders.pix2struct.num_heads=2")


def weights() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "eagle_x4_tiny_weights.npz") as arrays:
        return dict(arrays)


def outputs() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "eagle_x4_tiny_outputs.npz") as arrays:
        return dict(arrays)


def config() -> dict:
    return json.loads((GOLDEN / "eagle_x4_tiny_config.json").read_text())


def write_shards(folder: Path, tensors: dict[str, np.ndarray], *, num_shards: int) -> None:
    """safetensors files with an index; neighbours in name lie in different files."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        names = sorted(tensors)[shard::num_shards]
        part = {name: np.ascontiguousarray(tensors[name]) for name in names}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_eagle(folder: Path, tensors: dict[str, np.ndarray], *, num_shards: int = 3) -> Path:
    """An EAGLE folder."""
    write_shards(folder, tensors, num_shards=num_shards)
    shutil.copy(GOLDEN / "eagle_x4_tiny_config.json", folder / "config.json")
    return folder


def master_image() -> np.ndarray:
    """float32[1, 1024, 1024, 3], normalised."""
    y, x, c = np.meshgrid(np.arange(1024.0), np.arange(1024.0), np.arange(3.0), indexing="ij")
    image = np.sin(0.013 * (c + 1) * x + 0.7 * c) * np.cos(0.017 * (c + 1) * y)
    image += 0.5 * np.sin(0.11 * (x + 2 * y) + c)
    image += 0.25 * np.cos(0.37 * x - 0.29 * y * (c + 1))
    return image[None].astype(np.float32)
