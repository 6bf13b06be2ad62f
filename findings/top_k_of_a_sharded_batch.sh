#!/usr/bin/env bash
# jax.lax.top_k over the last axis of an array whose first axis is sharded gathers the whole batch on
# every device, on CPUs. jax.lax.approx_max_k, jnp.argmax and jnp.sort of the same array do not.
#
# Versions: jax and jaxlib 0.10.2, Python 3.11, 8 simulated CPU devices.
# Seen, collectives in the compiled program of float32[64, 1024], rows over 8 devices:
#   top_k: ['all-gather']
#   approx_max_k: []
#   argmax: []
#   sort: []
#   top_k in shard_map: []
# Rows are independent, so nothing has to move. What helps: shard_map, or a sort.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/show.py" <<'PYTHON'
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

mesh = jax.make_mesh((8,), ("data",))
spec = PartitionSpec("data")
rows = NamedSharding(mesh, spec)
x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=rows)


def top_k(x):
    return jax.lax.top_k(x, 16)[0]


programs = {
    "top_k": top_k,
    "approx_max_k": lambda x: jax.lax.approx_max_k(x, 16)[0],
    "argmax": lambda x: jnp.argmax(x, axis=-1),
    "sort": lambda x: jnp.sort(x, axis=-1)[:, -16:],
    "top_k in shard_map": jax.shard_map(top_k, mesh=mesh, in_specs=spec, out_specs=spec),
}
for name, function in programs.items():
    text = jax.jit(function, out_shardings=rows).lower(x).compile().as_text()
    collectives = r" (all-gather|all-reduce|all-to-all|collective-permute)\("
    print(f"{name}: {sorted(set(re.findall(collectives, text)))}")
PYTHON
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 \
  "$folder/environment/bin/python" "$folder/show.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
top_k: ['all-gather']
approx_max_k: []
argmax: []
sort: []
top_k in shard_map: []
EXPECTED
