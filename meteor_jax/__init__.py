"""Multi-encoder vision-language models with METEOR token pruning. The public API.

Names are imported when first used, so that `import meteor_jax` is quick.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "Batch": "types",
    "Calibration": "pruning.calibration",
    "Cost": "models.eagle.cost",
    "Engine": "inference.engine.engine",
    "Generation": "inference.generate",
    "Meteor": "models.eagle.model",
    "MeteorConfig": "models.eagle.model",
    "Method": "pruning.method",
    "Prediction": "inference.engine.request",
    "PrunePlan": "pruning.plan",
    "PruneTrace": "types",
    "Request": "inference.engine.request",
    "Sampling": "inference.sampling",
    "Step": "pruning.plan",
    "VisualTokens": "types",
    "count_cost": "models.family",
    "generate": "inference.generate",
    "load_engine": "inference.load",
    "parse_plan": "pruning.text",
    "preset": "pruning.registry",
    "register": "pruning.registry",
    "restore_params": "checkpoint",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"meteor_jax has no '{name}'")
    return getattr(importlib.import_module(f"meteor_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
