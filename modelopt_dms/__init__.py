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

from modelopt_dms.checkpoints.registration import register_when_imported

if TYPE_CHECKING:
    from modelopt_dms.calibration.run import CalibrationResult, calibrate
    from modelopt_dms.checkpoints.base import load_base
    from modelopt_dms.checkpoints.load import load
    from modelopt_dms.config.calibrate import CalibrateConfig
    from modelopt_dms.config.dms import DMSConfig
    from modelopt_dms.config.quantize import QuantizationConfig
    from modelopt_dms.config.recipe import Recipe, load_recipe
    from modelopt_dms.config.retrofit import RetrofitConfig
    from modelopt_dms.data.dry_run import Preview, preview
    from modelopt_dms.data.inputs import Blend, Formatted
    from modelopt_dms.evaluation.tuning import tune
    from modelopt_dms.exporters import export
    from modelopt_dms.gates.gate import eviction_off
    from modelopt_dms.gates.thresholds import set_compression
    from modelopt_dms.kvcache.hf_cache import KVStats, kv_stats
    from modelopt_dms.modeling.dms_cache import DMSCache
    from modelopt_dms.modeling.generation import graphed
    from modelopt_dms.modeling.mode import apply_dms
    from modelopt_dms.pipeline import compress
    from modelopt_dms.quantization.apply import quantize
    from modelopt_dms.serving.planner.capacity import plan
    from modelopt_dms.training.loop import RetrofitResult, retrofit
    from modelopt_dms.training.traces import Sampling, generate_traces

try:
    __version__ = version("modelopt-dms")
except PackageNotFoundError:
    __version__ = "0+unknown"

# No module bears the name of a public function: importing it would put the module in the function's place.
_HOME = {
    "Blend": "data.inputs",
    "CalibrateConfig": "config.calibrate",
    "CalibrationResult": "calibration.run",
    "DMSCache": "modeling.dms_cache",
    "DMSConfig": "config.dms",
    "Formatted": "data.inputs",
    "KVStats": "kvcache.hf_cache",
    "Preview": "data.dry_run",
    "QuantizationConfig": "config.quantize",
    "Recipe": "config.recipe",
    "RetrofitConfig": "config.retrofit",
    "RetrofitResult": "training.loop",
    "Sampling": "training.traces",
    "apply_dms": "modeling.mode",
    "calibrate": "calibration.run",
    "compress": "pipeline",
    "eviction_off": "gates.gate",
    "export": "exporters",
    "generate_traces": "training.traces",
    "graphed": "modeling.generation",
    "kv_stats": "kvcache.hf_cache",
    "load": "checkpoints.load",
    "load_base": "checkpoints.base",
    "load_recipe": "config.recipe",
    "plan": "serving.planner.capacity",
    "preview": "data.dry_run",
    "quantize": "quantization.apply",
    "retrofit": "training.loop",
    "set_compression": "gates.thresholds",
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
    "plan",
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
