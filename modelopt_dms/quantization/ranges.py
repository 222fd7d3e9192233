# SPDX-License-Identifier: Apache-2.0
"""Ranges of calibrated quantizers, made what ModelOpt's unified checkpoint will hold of them.

That checkpoint gives linears that read the same input (q, k, v; gate, up) one NVFP4 range, and holds scales in place of
ranges. Settled right after calibration, a model computes the same before it is exported and after.
"""

from typing import Any

import torch
from modelopt.torch.export.unified_export_hf import collect_shared_input_modules
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelopt_dms.kernels.number_formats import E2M1_MAX, E4M3_MAX, INT8_MAX

ROLES = ("input_quantizer", "weight_quantizer")


def round_scales(model: PreTrainedModel) -> None:
    """Share and round the ranges of all calibrated quantizers, in place.

    Ranges move by rounding errors at most; shared NVFP4 ranges become the largest of their group.
    """
    for group in _shared_inputs(model):
        for role in ROLES:
            quantizers = [getattr(module, role) for module in group]
            if len(group) > 1 and all(_is_shared_format(x) for x in quantizers):
                largest = torch.stack([x.amax for x in quantizers]).max()
                for quantizer in quantizers:
                    quantizer.amax = largest
    for name, module in model.named_modules():
        if not isinstance(module, TensorQuantizer) or module.amax is None:
            continue
        code = _largest_code(module, kv=name.endswith("_bmm_quantizer"))
        amax = module.amax.float() if code is None else _as_stored(module.amax, code)
        # Not assigned in place: that would round it to the model's dtype, in which ModelOpt has measured it, while what
        # is read back from a scale is float32, and quantizers compute in the dtype of their range.
        del module._amax
        module.amax = amax


@torch.no_grad()
def put_weights_on_grids(model: PreTrainedModel) -> None:
    """Replace FP8 weights by the values that the model computes with, in place.

    The model computes what it did: to quantize what is quantized changes nothing. Blocks of NVFP4 carry scales of their
    own, which ModelOpt packs as it computes them.
    """
    for module in model.modules():
        if not isinstance(module, QuantModule):
            continue
        for weight, quantizer in module.iter_weights_for_calibration():
            if not _is_fp8(quantizer):
                continue
            name = next(
                (x for x, held in module.named_parameters(recurse=False) if held is weight), None
            )
            if name is None:  # One expert of many, a view.
                weight.copy_(quantizer(weight))
            else:  # Not in place: the weight of an output layer may be the embeddings too, which are not quantized.
                setattr(module, name, nn.Parameter(quantizer(weight), requires_grad=False))


def _is_fp8(quantizer: Any) -> bool:
    return (
        isinstance(quantizer, TensorQuantizer)
        and quantizer.is_enabled
        and quantizer.amax is not None
        and quantizer.num_bits == (4, 3)
        and quantizer.block_sizes is None
    )


def _shared_inputs(model: Any) -> list[list[Any]]:
    """Groups of quantized linears that read the same tensor."""

    def probe() -> None:
        model(torch.zeros(1, 2, dtype=torch.long, device=model.device))

    return list(collect_shared_input_modules(model, probe)[0].values())


def _is_shared_format(quantizer: Any) -> bool:
    amax = getattr(quantizer, "_amax", None)
    return bool(quantizer.is_nvfp4_dynamic) and amax is not None and amax.numel() == 1


def _largest_code(quantizer: Any, kv: bool) -> float | None:
    """What a range is divided by to give the scale that is stored; for keys and values, FP8's also in NVFP4."""
    if quantizer.is_nvfp4_dynamic:
        return E4M3_MAX if kv else E2M1_MAX * E4M3_MAX
    if quantizer.block_sizes is not None or quantizer.num_bits not in (8, (4, 3)):
        return None
    return INT8_MAX if quantizer.num_bits == 8 else E4M3_MAX


def _as_stored(amax: Tensor, largest: float) -> Tensor:
    """The range that is read back from the scale of a range."""
    return amax.float() / largest * largest
