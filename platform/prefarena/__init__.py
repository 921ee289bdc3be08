"""Prefarena: RLHF and off-policy preference optimisation, compared on one footing.

From Python and notebooks:

    import prefarena

    result = prefarena.compare("config.yaml")  # as `prefarena compare config.yaml`
    result = prefarena.tune("config.yaml")  # as `prefarena tune config.yaml`
    result = prefarena.load_results("runs/default-1a2b3c4d")
    result.table, result.findings, result.figures, result.models
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.api import compare, tune
    from prefarena.errors import UserError
    from prefarena.report.comparison import ComparisonResult, load_results

__version__ = "0.1.0"
__all__ = ["ComparisonResult", "UserError", "__version__", "compare", "load_results", "tune"]

#: Where each name is. They are found when they are asked for, as they bring much with them. `compare` and `tune` belong
#: to the pipelines, which are made of this package: the front door, through which no module of the package goes.
_HOMES = {
    "compare": "pipelines.api",
    "tune": "pipelines.api",
    "load_results": "prefarena.report.comparison",
    "ComparisonResult": "prefarena.report.comparison",
    "UserError": "prefarena.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prefarena' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
