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


LONGEST = (
    "test_readme.py",
    "test_processes.py",
    "test_invariants.py",
    "test_baselines.py",
    "test_prefill_extend.py",
    "test_calibrate.py",
    "test_generate.py",
    "test_bench.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first, or one worker would run one alone at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
