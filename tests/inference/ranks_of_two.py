"""One of two processes that measure the tiny model's ranks: `… -m tests.inference.ranks_of_two PORT
ID` prints how many maps it decomposed, and the ranks."""

import json
import sys

import jax
import numpy as np

from meteor_jax.inference import ranks as measuring
from meteor_jax.models.eagle.family import Eagle
from meteor_jax.parallel.distributed import start_processes
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.parallel.rules import parameter_shardings
from meteor_jax.pruning.ops.ranks import numerical_ranks
from tests import tiny_model as tiny


def main(port, process):
    start_processes(coordinator=f"localhost:{port}", num_processes=2, process_id=int(process))
    counts = []

    def count(features, **options):
        counts.append(features.shape)
        return numerical_ranks(features, **options)

    measuring.numerical_ranks = count
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    whole = jax.device_get(tiny.params())
    mesh = make_mesh(MeshConfig(data=1, tensor=2))

    def place(leaf, sharding):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    params = jax.tree.map(
        place, whole, parameter_shardings(whole, mesh, rules=Eagle(tiny.CONFIG).sharding_rules)
    )
    with jax.set_mesh(mesh):
        ranks = measuring.calibrate_ranks(tiny.MODEL, params, images)
    print(json.dumps([len(counts), ranks]))


if __name__ == "__main__":
    main(*sys.argv[1:])
