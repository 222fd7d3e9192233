# SPDX-License-Identifier: Apache-2.0
"""Dynamic Memory Sparsification for NVIDIA Model Optimizer: a causal LM learns what its KV cache may forget.

    import modelopt_dms as dms

    model = dms.compress(model, "dms_cr4", tokenizer=tokenizer, data=texts)
    model.generate(**inputs)
    print(dms.kv_stats(model))

Importing the package costs nothing; the first use of a name below imports transformers and ModelOpt. From then on
`from_pretrained` of transformers loads the directories that are saved here, and ModelOpt has the mode "dms".
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from modelopt_dms.registering import register_when_imported

if TYPE_CHECKING:
    from modelopt_dms.cache import KVStats, kv_stats
    from modelopt_dms.calibration.run import CalibrationResult, calibrate
    from modelopt_dms.checkpoints.base import load_base
    from modelopt_dms.compression import set_compression
    from modelopt_dms.config import (
        CalibrateConfig,
        DMSConfig,
        QuantizationConfig,
        RetrofitConfig,
    )
    from modelopt_dms.data.inputs import Blend, Formatted
    from modelopt_dms.evaluation.tuning import tune
    from modelopt_dms.exporters import export
    from modelopt_dms.flow import compress
    from modelopt_dms.gate import eviction_off
    from modelopt_dms.generation import graphed
    from modelopt_dms.loading import load
    from modelopt_dms.mode import apply_dms
    from modelopt_dms.paged_cache import DMSCache
    from modelopt_dms.previews import Preview, preview
    from modelopt_dms.quantization import quantize
    from modelopt_dms.recipe import Recipe, load_recipe
    from modelopt_dms.traces import Sampling, generate_traces
    from modelopt_dms.train.loop import RetrofitResult, retrofit

try:
    __version__ = version("modelopt-dms")
except PackageNotFoundError:
    __version__ = "0+unknown"

# No module bears the name of a public function: importing it would put the module in the function's place.
_HOME = {
    "Blend": "data.inputs",
    "CalibrateConfig": "config",
    "CalibrationResult": "calibration.run",
    "DMSCache": "paged_cache",
    "DMSConfig": "config",
    "Formatted": "data.inputs",
    "KVStats": "cache",
    "Preview": "previews",
    "QuantizationConfig": "config",
    "Recipe": "recipe",
    "RetrofitConfig": "config",
    "RetrofitResult": "train.loop",
    "Sampling": "traces",
    "apply_dms": "mode",
    "calibrate": "calibration.run",
    "compress": "flow",
    "eviction_off": "gate",
    "export": "exporters",
    "generate_traces": "traces",
    "graphed": "generation",
    "kv_stats": "cache",
    "load": "loading",
    "load_base": "checkpoints.base",
    "load_recipe": "recipe",
    "preview": "previews",
    "quantize": "quantization",
    "retrofit": "train.loop",
    "set_compression": "compression",
    "tune": "evaluation.tuning",
}

__all__ = [
    "Blend",
    "CalibrateConfig",
    "CalibrationResult",
    "DMSCache",
    "DMSConfig",
    "Formatted",
    "KVStats",
    "Preview",
    "QuantizationConfig",
    "Recipe",
    "RetrofitConfig",
    "RetrofitResult",
    "Sampling",
    "apply_dms",
    "calibrate",
    "compress",
    "eviction_off",
    "export",
    "generate_traces",
    "graphed",
    "kv_stats",
    "load",
    "load_base",
    "load_recipe",
    "preview",
    "quantize",
    "retrofit",
    "set_compression",
    "tune",
]


register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
