"""Eight CPU devices, set before anything imports jax.

The tests' programs run for milliseconds, so LLVM is told to compile quickly instead of well.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def pytest_collection_modifyitems(items):
    """The longest file first, or one worker would run it alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")
