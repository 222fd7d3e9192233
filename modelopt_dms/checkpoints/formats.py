# SPDX-License-Identifier: Apache-2.0
"""Whether a directory holds plain weights, told from its JSON files and tensor headers. Imports nothing heavy."""

import json
import struct
from pathlib import Path
from typing import Any

# Numbers that a weight can be read from without a scale.
PLAIN = ("F64", "F32", "F16", "BF16")
# A model that this package has written: `checkpoints.load.load` knows how.
OURS = ("dms_config", "dms_quantization", "dms_window_size")
_WAY_OUT = "start from the original checkpoint in float32, float16 or bfloat16"
# Longer than any checkpoint's; a damaged file gives any number.
_LONGEST_HEADER = 1 << 28


class FormatError(ValueError):
    """Weights that are not plain numbers; the message says what they are."""


def check_plain(place: str | Path) -> None:
    """Refuse a directory whose weights are packed, scaled, or only a part of a model's.

    Args:
        place: directory of a Hugging Face model, ours or not; anything else is not looked at.

    Raises:
        FormatError: quantized, an adapter, or weights in another number format.
    """
    path = Path(place)
    config = read_json(path / "config.json")
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise FormatError(
            f"{path} is a PEFT adapter of {base!r}, not a model; merge it first (PeftModel.merge_and_unload) and save "
            "the result"
        )
    if any(config.get(x) for x in OURS):
        return
    texts = [config, *(x for x in config.values() if isinstance(x, dict))]
    how = next((x["quantization_config"] for x in texts if x.get("quantization_config")), None)
    if how is not None:
        method = how.get("quant_method") if isinstance(how, dict) else how
        raise FormatError(
            f"{path}: the weights are quantized (quantization_config.quant_method={method!r}); {_WAY_OUT}"
        )
    if (path / "hf_quant_config.json").is_file():
        section = read_json(path / "hf_quant_config.json").get("quantization") or {}
        raise FormatError(
            f"{path}: the weights are quantized by ModelOpt (hf_quant_config.json: "
            f"quant_algo={section.get('quant_algo')!r}); {_WAY_OUT}"
        )
    for file in sorted(path.glob("*.safetensors")):
        _check_tensors(file)


def is_ours(place: str | Path) -> bool:
    """Whether a directory holds gates or quantizers, or says so; what loading then makes of it is another question."""
    path = Path(place)
    if any(read_json(path / "config.json").get(x) for x in OURS):
        return True
    return any(".dms_gate." in x for file in path.glob("*.safetensors") for x in _header(file))


def _check_tensors(file: Path) -> None:
    for name, entry in _header(file).items():
        kind = entry.get("dtype") if isinstance(entry, dict) else None
        if name.rpartition(".")[2] in ("qweight", "qzeros", "weight_packed", "weight_scale"):
            raise FormatError(f"{file}: {name} belongs to quantized weights; {_WAY_OUT}")
        if name.endswith("weight") and kind not in PLAIN:
            raise FormatError(f"{file}: {name} is stored as {kind}; {_WAY_OUT}")


def _header(file: Path) -> dict[str, Any]:
    """Tensors by name, from the JSON that a safetensors file begins with."""
    try:
        with open(file, "rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > min(_LONGEST_HEADER, file.stat().st_size):
                raise ValueError(f"a header of {size} bytes")
            header: dict[str, Any] = json.loads(stream.read(size))
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise FormatError(f"{file} cannot be read: {error}") from error
    header.pop("__metadata__", None)
    return header


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file.

    Raises:
        FormatError: it cannot be read, or is no object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}; expected an object")
    return content
