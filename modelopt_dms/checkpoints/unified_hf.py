# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's unified Hugging Face checkpoint -> plain weights and the ranges of the quantizers that made it.

Tensors there: `weight` packed (FP8; NVFP4 two a byte), `weight_scale` and `weight_scale_2`, `input_scale`, and
`k_proj.k_scale`, `v_proj.v_scale`; experts one by one or fused.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from modelopt_dms.kernels.number_formats import BLOCK, E2M1_MAX, E4M3_MAX, Nvfp4
from modelopt_dms.modeling.mode import CheckpointError

PACKED_FILE = "hf_quant_config.json"
SCALES = ("weight_scale", "weight_scale_2", "input_scale")
READABLE = ("FP8", "NVFP4", "W4A16_NVFP4", None)


def is_packed(path: Path) -> bool:
    """Whether a directory holds a unified checkpoint."""
    return (path / PACKED_FILE).is_file()


def unpack(stored: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights in float32, by name, and ranges of quantizers, by the names of ModelOpt's buffers.

    Args:
        stored: all tensors of the checkpoint.
        path: its directory.

    Raises:
        CheckpointError: weights are packed in a way that is not read here.
    """
    quantization = json.loads((path / PACKED_FILE).read_text(encoding="utf-8"))["quantization"]
    for field in ("quant_algo", "kv_cache_quant_algo"):
        if quantization.get(field) not in READABLE:
            raise CheckpointError(
                f"{path} holds {field}={quantization[field]!r}; only {READABLE[:-1]} can be read back. Load the "
                "directory that compress saved instead"
            )
    weights: dict[str, Tensor] = {}
    ranges: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name, _, kind = key.rpartition(".")
        if kind in ("k_scale", "v_scale"):
            attention = name.rpartition(".")[0]
            ranges[f"{attention}.{kind[0]}_bmm_quantizer._amax"] = tensor.float() * E4M3_MAX
        elif not key.endswith(SCALES):
            weights[key], found = _unpack_weight(key, tensor, stored)
            ranges |= found
    return weights, ranges


def kv_ranges(path: Path, layers: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Ranges of FP8 keys and values by the names of attention layers; none where the KV cache is not quantized.

    Args:
        path: directory of any checkpoint.
        layers: names of the attention layers that are asked for.

    Raises:
        CheckpointError: the cache is quantized otherwise, or a layer has more than one scale.
    """
    if not is_packed(path):
        return {}
    found = json.loads((path / PACKED_FILE).read_text(encoding="utf-8"))["quantization"]
    number = found.get("kv_cache_quant_algo")
    if number not in ("FP8", None):
        raise CheckpointError(
            f"{path}: kv_cache_quant_algo={number!r}; accepted here: 'FP8' or none"
        )
    if number is None:
        return {}
    scales: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            keys = [x for x in list(stored.keys()) if x.endswith((".k_scale", ".v_scale"))]
            scales |= {key: stored.get_tensor(key) for key in keys}
    several = [key for key, x in scales.items() if x.numel() > 1]
    if several:
        raise CheckpointError(f"{path}: {several[0]} holds a scale a head; accepted here: one")

    def largest(layer: str, kind: str) -> float:
        # Without a scale stored, FP8 numbers are what they say.
        scale = scales.get(f"{layer}.{kind}_proj.{kind}_scale")
        return E4M3_MAX * (1.0 if scale is None else float(scale))

    return {layer: (largest(layer, "k"), largest(layer, "v")) for layer in layers}


def _unpack_weight(
    key: str, tensor: Tensor, stored: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A tensor in plain numbers, and the ranges of its quantizers by name; none if it is not packed."""
    # Fused experts are parameters of their own: experts.down_proj, experts.down_proj_weight_scale.
    prefix = key.removesuffix("weight") if key.endswith(".weight") else f"{key}_"
    scale, double = (stored.get(f"{prefix}weight_scale{x}") for x in ("", "_2"))
    if scale is None:
        return tensor, {}
    plain, amax = _plain(tensor, scale, double)
    ranges = {f"{prefix}weight_quantizer._amax": amax}
    if f"{prefix}input_scale" in stored:
        largest = E4M3_MAX * (1 if double is None else E2M1_MAX)
        measured = stored[f"{prefix}input_scale"].float() * largest
        ranges[f"{prefix}input_quantizer._amax"] = measured
    return plain, ranges


def _plain(weight: Tensor, scale: Tensor, double_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """A packed weight [out, in] as float32, and its amax."""
    if double_scale is None:
        if weight.dtype != torch.float8_e4m3fn:
            raise CheckpointError(f"a weight of {weight.dtype} without weight_scale_2 is not FP8")
        return weight.float() * scale.float().reshape(
            -1, *[1] * (weight.ndim - 1)
        ), scale.float() * E4M3_MAX
    amax = (double_scale.float() * (E2M1_MAX * E4M3_MAX)).reshape(1)
    # Fused experts of some families are [E, in, out]; packed is the dimension that is summed over.
    transposed = weight.shape[-1] * 2 != scale.shape[-1] * BLOCK
    if transposed:
        weight, scale = weight.transpose(-1, -2), scale.transpose(-1, -2)
    rows = torch.cat([weight, scale.contiguous().view(torch.uint8)], dim=-1)
    plain = Nvfp4(amax).decode(rows, weight.shape[-1] * 2, torch.float32)
    return plain.transpose(-1, -2) if transposed else plain, amax.squeeze()
