"""fieldguide: the field guide to neural networks that runs.

Everything here is imported when first used, so that `import fieldguide` costs nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from fieldguide.core.version import __version__

# Threads of libgomp wait for each other by spinning for a millisecond. If another program uses one of the cores, every operation
# then takes that long: a training step of a small network took 5 s instead of 0.06 s. libgomp reads this when torch is loaded.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOME = {
    "fit": "fieldguide.automl.fit",
    "resume": "fieldguide.automl.fit",
    "finish": "fieldguide.automl.fit",
    "plan": "fieldguide.automl.plan",
    "open_run": "fieldguide.inference.run",
    "Run": "fieldguide.inference.run",
    "pipeline": "fieldguide.inference.pipeline",
    "compare": "fieldguide.report.compare",
    "export": "fieldguide.exporting.export",
    "Predictor": "fieldguide.inference.predictor",
    "create": "fieldguide.models.registry",
    "list_models": "fieldguide.automl.catalogue",
    "show": "fieldguide.automl.catalogue",
    "load": "fieldguide.checkpoints.load",
    "save": "fieldguide.checkpoints.load",
    "fill": "fieldguide.checkpoints.weights:load",
    "read": "fieldguide.data",
    "advise": "fieldguide.automl.advise",
    "FieldguideClassifier": "fieldguide.automl.sklearn",
    "FieldguideRegressor": "fieldguide.automl.sklearn",
    "FieldguideError": "fieldguide.core.errors",
    "DataError": "fieldguide.core.errors",
    "SettingsError": "fieldguide.core.errors",
    "WeightsError": "fieldguide.core.errors",
    "RunError": "fieldguide.core.errors",
    "TrainingError": "fieldguide.core.errors",
}

__all__ = ["__version__", "models", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module("fieldguide.models")
    if name not in _HOME:
        raise AttributeError(f"module 'fieldguide' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
