# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's quantizers as QuantizeLinear and DequantizeLinear nodes, weights as codes.

FP8 (e4m3) and int8, with a calibrated scale for a tensor or one for each index of an axis: what ONNX has nodes for and
onnxruntime computes. Scales are in the dtype of what is quantized.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_dms.exporters import ExportError
from modelopt_dms.kernels.number_formats import E4M3_MAX, INT8_MAX

ACCEPTED = "FP8 (e4m3) or int8 with calibrated scales"
# By ModelOpt's num_bits: dtype of codes, the largest, and ONNX's number of that dtype.
_CODES = {(4, 3): (torch.float8_e4m3fn, E4M3_MAX, 17), 8: (torch.int8, INT8_MAX, 3)}


def check(model: nn.Module) -> None:
    """Refuse quantizers that ONNX has no nodes for.

    Raises:
        ExportError: names the first of them.
    """
    for name, quantizer in _enabled(model):
        reason = None
        if quantizer.num_bits not in _CODES or quantizer.block_sizes is not None:
            reason = f"num_bits {quantizer.num_bits}, block_sizes {quantizer.block_sizes}"
        elif quantizer._dynamic or (amax := _amax(quantizer)) is None:
            reason = "no calibrated amax"
        elif quantizer.rotate_is_enabled or quantizer.bias is not None:
            reason = "a rotation or an affine bias"
        elif sum(size > 1 for size in amax.shape) > 1:
            reason = f"an amax of shape {tuple(amax.shape)}"
        if reason is not None:
            raise ExportError(
                f"{name} quantizes in a way that a graph cannot ({reason}); accepted: {ACCEPTED}"
            )


@contextmanager
def as_nodes(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, quantizers of a model of this dtype trace as nodes, and weights as the codes that they become.

    Raises:
        ExportError: afterwards, if a quantizer was not traced: the graph would compute something else.
    """
    traced: set[int] = set()
    with ExitStack() as stack:
        for name, quantizer in _enabled(model):
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            weight = getattr(module, "weight", None) if leaf == "weight_quantizer" else None
            stack.enter_context(_traced(quantizer, weight, dtype, traced))
        yield
        for name, quantizer in _enabled(model):
            if id(quantizer) not in traced:
                raise ExportError(
                    f"{name} is not reached when the model is traced (experts are computed all at once); leave it "
                    "unquantized to export a graph"
                )


@contextmanager
def _traced(
    quantizer: Any, weight: Tensor | None, dtype: torch.dtype, traced: set[int]
) -> Iterator[None]:
    made = _activation(quantizer, dtype) if weight is None else _weight(quantizer, weight)

    def forward(x: Tensor) -> Tensor:
        traced.add(id(quantizer))
        return made(x)

    quantizer.forward = forward
    try:
        yield
    finally:
        del quantizer.forward
        for name in ("onnx_scale", "onnx_codes"):
            quantizer._buffers.pop(name, None)


def _activation(quantizer: Any, model_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    dtype, _, code = _CODES[quantizer.num_bits]
    attributes = _stage_scale(quantizer, model_dtype)

    def forward(x: Tensor) -> Tensor:
        if quantizer.pre_quant_scale is not None:
            x = x * quantizer.pre_quant_scale.to(x.dtype)
        scale = quantizer.onnx_scale
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear",
            (x, scale),
            attrs={**attributes, "output_dtype": code},
            dtype=dtype,
            shape=x.shape,
            version=21,
        )
        return _dequantized(codes, scale, attributes, x)

    return forward


def _weight(quantizer: Any, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What stands in for a weight quantizer: the codes are made once, here, and go into the graph."""
    dtype, largest, _ = _CODES[quantizer.num_bits]
    attributes = _stage_scale(quantizer, weight.dtype)
    amax = _amax(quantizer)
    if weight.dtype != torch.float32:  # by the scale as it is stored, rounded
        amax = (quantizer.onnx_scale.float() * largest).view(amax.shape)
    scaled = weight.detach().float() * (largest / torch.where(amax == 0, 1.0, amax))
    scaled = scaled.clamp(-largest, largest)
    codes = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    quantizer.register_buffer("onnx_codes", codes, persistent=False)

    def forward(x: Tensor) -> Tensor:
        return _dequantized(quantizer.onnx_codes, quantizer.onnx_scale, attributes, x)

    return forward


def _dequantized(codes: Tensor, scale: Tensor, attributes: dict[str, int], like: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale),
        attrs=dict(attributes),
        dtype=like.dtype,
        shape=like.shape,
        version=21,
    )


def _stage_scale(quantizer: Any, dtype: torch.dtype) -> dict[str, int]:
    """Put the scale, one or one for each index of an axis, where tracing finds it; the nodes' attributes."""
    amax = _amax(quantizer)
    scale = (torch.where(amax == 0, 1.0, amax) / _CODES[quantizer.num_bits][1]).to(dtype)
    if amax.numel() == 1:
        quantizer.register_buffer("onnx_scale", scale.reshape(()), persistent=False)
        return {}
    quantizer.register_buffer("onnx_scale", scale.flatten(), persistent=False)
    return {"axis": next(i for i, size in enumerate(amax.shape) if size > 1)}


def _amax(quantizer: Any) -> Any:
    """Calibrated amax in float32, or None."""
    if quantizer._use_constant_amax:
        return torch.tensor(E4M3_MAX)
    return None if quantizer.amax is None else quantizer.amax.detach().float()


def _enabled(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, x)
        for name, x in model.named_modules()
        if isinstance(x, TensorQuantizer) and x.is_enabled and x._if_quant
    ]
