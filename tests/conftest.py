"""Eight CPU devices, set before anything imports jax.

The tests' programs run for milliseconds, so LLVM is told to compile quickly instead of well, and
what one test, worker or program compiled is kept on disk for all the others.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
CACHE = Path(__file__).parent.parent / ".pytest_cache/xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_collection_modifyitems(items):
    """The longest file first, or one worker would run it alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")
