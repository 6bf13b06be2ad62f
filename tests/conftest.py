"""Eight CPU devices, set before anything imports jax.

The tests' programs run for milliseconds, so LLVM is told to compile quickly instead of well.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
