"""fieldguide: the field guide to neural networks that runs.

Everything here is imported when first used, so that `import fieldguide` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "fit": "fieldguide.fitting", "resume": "fieldguide.fitting", "open_run": "fieldguide.run", "Run": "fieldguide.run",
    "create": "fieldguide.registry", "list_models": "fieldguide.catalogue", "show": "fieldguide.catalogue",
    "load": "fieldguide.pretrained", "save": "fieldguide.pretrained", "fill": "fieldguide.weights:load",
    "read": "fieldguide.data", "advise": "fieldguide.advisor",
    "FieldguideClassifier": "fieldguide.estimators", "FieldguideRegressor": "fieldguide.estimators",
    "FieldguideError": "fieldguide.errors", "DataError": "fieldguide.errors", "SettingsError": "fieldguide.errors",
    "WeightsError": "fieldguide.errors", "RunError": "fieldguide.errors", "TrainingError": "fieldguide.errors",
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
