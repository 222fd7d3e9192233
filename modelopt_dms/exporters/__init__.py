# SPDX-License-Identifier: Apache-2.0
"""What a compressed model is written as, for those who serve it.

Importing this costs nothing: what builds TensorRT engines runs where there is no transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelopt_dms.exporters.errors import ExportError
    from modelopt_dms.exporters.hf import RECIPE_FILE, export

_HOME = {"ExportError": "errors", "RECIPE_FILE": "hf", "export": "hf"}

__all__ = ["RECIPE_FILE", "ExportError", "export"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
