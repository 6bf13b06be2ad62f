"""Eight CPU devices, set before anything imports jax.

The tests' programs run for milliseconds, so XLA is told to compile quickly instead of well, and
what one test, worker or program compiled is kept on disk for all the others.
"""

import gc
import os
import platform
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# The older emitters compile the whole tiny model in a third of the time. With them, tests of equal
# bits need fused multiply-add off, so that no number depends on what a program fuses. These tests
# hold under XLA's own defaults too: XLA_FLAGS= pytest tests/test_invariants.py
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
if platform.machine() == "x86_64":
    FLAGS += " --xla_cpu_max_isa=SSE4_2"
os.environ.setdefault("XLA_FLAGS", FLAGS)
CACHE = Path(__file__).parent.parent / ".pytest_cache/xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

gc.set_threshold(50_000)  # tracing makes and keeps many small objects; looking at them costs 1/8


LONGEST = (
    "test_readme.py",
    "test_processes.py",
    "test_invariants.py",
    "test_methods.py",
    "test_prefill_extend.py",
    "test_calibrate.py",
    "test_generate.py",
    "test_bench.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first, or one worker would run one alone at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
