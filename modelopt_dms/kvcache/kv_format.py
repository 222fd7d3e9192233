# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's KV quantizers -> the number formats in which the cache stores rows."""

from typing import Any

import torch

from modelopt_dms.kernels.number_formats import BLOCK, E4M3_MAX, Fp8, Int8, Nvfp4, RowFormat

ACCEPTED = "fp8 (e4m3), int8, or dynamic nvfp4 in blocks of 16; one scale, one a KV head, or dynamic one a row"


class KVFormatError(ValueError):
    """KV quantizers whose numbers the cache cannot store; the message says what they are."""


def kv_formats(module: Any) -> tuple[RowFormat | None, RowFormat | None]:
    """Formats of an attention module's keys and values; None is the model's own dtype.

    Raises:
        KVFormatError: a quantizer computes something that no format stores.
    """
    formats = tuple(row_format(getattr(module, f"{x}_bmm_quantizer", None)) for x in "kv")
    if hasattr(module, "expand_kv") and any(formats):
        raise KVFormatError(
            "a layer that caches a latent (MLA) cannot store what KV quantizers compute from it; disable its "
            "[kv]_bmm_quantizer, as modelopt_dms.quantize does"
        )
    return formats  # type: ignore[return-value]


def row_format(quantizer: Any) -> RowFormat | None:
    """What a ModelOpt TensorQuantizer on [B, K, T, D] computes, as a format; None if it computes nothing (yet)."""
    if quantizer is None or not quantizer.is_enabled or not quantizer._if_quant:
        return None
    if quantizer.bias is not None or quantizer.rotate_is_enabled:
        raise KVFormatError(_refusal(quantizer, "an affine bias or a rotation"))
    if quantizer.is_nvfp4_dynamic:
        if quantizer.block_sizes.get(-1) != BLOCK:
            raise KVFormatError(_refusal(quantizer, f"blocks of {quantizer.block_sizes.get(-1)}"))
        amax = _amax(quantizer)
        if amax is None or len(amax) > 1:
            raise KVFormatError(_refusal(quantizer, "no single calibrated amax"))
        return Nvfp4(amax)
    if quantizer.block_sizes is not None or quantizer.num_bits not in (8, (4, 3)):
        raise KVFormatError(
            _refusal(
                quantizer, f"num_bits {quantizer.num_bits}, block_sizes {quantizer.block_sizes}"
            )
        )
    return (Int8 if quantizer.num_bits == 8 else Fp8)(_amax(quantizer))


def _amax(quantizer: Any) -> torch.Tensor | None:
    """Calibrated amax [1] or [K]; None for a dynamic one a row."""
    if quantizer._use_constant_amax:
        return torch.tensor([E4M3_MAX])
    if quantizer._dynamic:
        if quantizer.block_sizes is None and quantizer.axis not in ((0, 1, 2), [0, 1, 2]):
            raise KVFormatError(_refusal(quantizer, f"a dynamic scale over axis {quantizer.axis}"))
        return None
    amax = quantizer.amax
    if amax is None:
        raise KVFormatError(
            "the KV quantizers have no amax; calibrate them (quantize with data): ModelOpt's KV configs alone name no "
            "algorithm, so join them to one that does, or use modelopt_dms.quantize"
        )
    if amax.ndim and amax.numel() > 1 and amax.shape != (1, amax.shape[1], 1, 1):
        raise KVFormatError(_refusal(quantizer, f"an amax of shape {tuple(amax.shape)}"))
    return amax.detach().flatten()


def _refusal(quantizer: Any, what: str) -> str:
    return f"the KV cache cannot store what {quantizer} computes ({what}); accepted: {ACCEPTED}"
