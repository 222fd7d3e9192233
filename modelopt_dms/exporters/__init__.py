# SPDX-License-Identifier: Apache-2.0
"""What a compressed model is written as, for those who serve it.

Importing this loads no transformers: what builds TensorRT engines runs where there is none.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modelopt_dms.config.recipe import Recipe
    from modelopt_dms.exporters.hf import RECIPE_FILE

__all__ = ["FORMATS", "RECIPE_FILE", "ExportError", "check_format", "export"]

# Formats by name, and the module that holds their function `export_<name>`.
FORMATS = {
    "hf": "hf",
    "onnx": "onnx.export",
    "tensorrt": "tensorrt.export",
    "trtllm": "trtllm.checkpoint",
}
_GRAPH = ("chunk", "max_length")
# What more they take, and which package they need.
_OPTIONS = {"onnx": _GRAPH, "tensorrt": (*_GRAPH, "plugin_free")}
_PACKAGES = {"onnx": "onnxscript", "tensorrt": "onnxscript"}


class ExportError(ValueError):
    """An export that cannot be made; the message says why."""


def __getattr__(name: str) -> Any:
    if name != "RECIPE_FILE":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modelopt_dms.exporters.hf import RECIPE_FILE

    return RECIPE_FILE


def export(
    model: "PreTrainedModel",
    output_dir: str | Path,
    format: str = "hf",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    recipe: "Recipe | None" = None,
    **options: Any,
) -> Path:
    """Write a model for serving.

    Args:
        model: compressed; not changed.
        output_dir: new or empty.
        format: "hf", ModelOpt's unified Hugging Face checkpoint of a quantized model; "onnx", graphs of a decode step
            and a prefill chunk; "tensorrt", those and the kernels that engines embed; "trtllm", a checkpoint together
            with what makes TensorRT-LLM's AutoDeploy serve it.
        tokenizer: written along with the model.
        recipe: written along with the model.
        **options: of the formats "onnx" (chunk, max_length) and "tensorrt" (these and plugin_free); see
            `exporters.tensorrt.export.export_tensorrt`.

    Raises:
        ExportError: unknown format, or a model that the format cannot hold.
        OutputError: the directory cannot be written to without losing something.
    """
    check_format(format, options)
    check_number_format(format, str(model.dtype).removeprefix("torch."))
    write = getattr(import_module(f"{__name__}.{FORMATS[format]}"), f"export_{format}")
    return write(model, output_dir, tokenizer=tokenizer, recipe=recipe, **options)


def check_format(format: str, options: dict[str, Any]) -> None:
    """Refuse what `export` would refuse whatever the model is.

    Raises:
        ExportError: unknown format, options of another one, or a package is missing.
    """
    if format not in FORMATS:
        raise ExportError(_refusal(format))
    known = _OPTIONS.get(format, ())
    for name in options:
        if name not in known:
            raise ExportError(
                f"{name} is no option of format={format!r}; it takes {', '.join(known) or 'none'}"
            )
    package = _PACKAGES.get(format)
    if package is not None and find_spec(package) is None:
        raise ExportError(
            f"format={format!r} needs {package}, which is not installed; pip install 'modelopt-dms[onnx]'"
        )


def check_number_format(format: str, dtype: str | None) -> None:
    """Refuse graphs that nothing could run, before the model is loaded.

    Raises:
        ExportError: onnxruntime's CPU kernels do not compute in this dtype.
    """
    if format == "onnx" and dtype == "bfloat16":
        raise ExportError(
            "format='onnx' of a bfloat16 model: onnxruntime's CPU kernels have no bfloat16; use --dtype float32 (in "
            "Python: load(..., dtype=torch.float32)), or format='tensorrt'"
        )


def _refusal(format: str) -> str:
    accepted = f"accepted: {', '.join(FORMATS)}"
    plain = format.lower().replace("-", "_")
    if plain in ("tensorrt_llm", "trt_llm"):
        return f"format={format!r} is not known; TensorRT-LLM's is 'trtllm' ({accepted})"
    if "trtllm" in plain or "tensorrt_llm" in plain:
        return (
            f"format={format!r}: TensorRT-LLM builds no engines any more (trtllm-build was removed after 1.3.0rc20; "
            "LLM(backend='tensorrt') raises), and its C++ runtime never knew lengths of KV heads of their own. Use "
            "'tensorrt' for a TensorRT engine with our own runtime, or 'trtllm' for TensorRT-LLM's AutoDeploy; 1.2.1, "
            f"the last release with trtllm-build, serves plain models only ({accepted})"
        )
    return f"format={format!r} is not known; {accepted}"
