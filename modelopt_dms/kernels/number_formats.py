# SPDX-License-Identifier: Apache-2.0
"""Number formats in which the KV cache stores its rows: one row [D] becomes N bytes, scales included, and back.

Rounding and scales are bit for bit those of ModelOpt's quantizers, so that what a cache holds is what ModelOpt's fake
quantization computed. A scale is calibrated (amax, one for all KV heads or one for each) or found row by row and stored
with the row.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_dms.kernels import row_bytes as sizes
from modelopt_dms.kernels.row_bytes import BLOCK

E4M3_MAX = 448.0
INT8_MAX = 127.0
E2M1_MAX = 6.0
SMALLEST_BLOCK_SCALE = 2.0**-9  # of e4m3
SMALLEST_AMAX = 2.0**-24  # below it, ModelOpt takes a tensor for zeros

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
_E2M1_BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


@dataclass(frozen=True)
class RowFormat(ABC):
    """A number format for rows.

    Attributes:
        amax: largest magnitude, [1] for all KV heads or [K]; None finds it row by row.
    """

    amax: Tensor | None
    name: ClassVar[str]

    @abstractmethod
    def row_bytes(self, dim: int) -> int:
        """Bytes N of a stored row of D values."""

    @abstractmethod
    def encode(self, rows: Tensor) -> Tensor:
        """Stored rows [B, K, T, N] uint8 of rows [B, K, T, D]."""

    @abstractmethod
    def decode(
        self, stored: Tensor, dim: int, dtype: torch.dtype, head: int | Tensor | None = None
    ) -> Tensor:
        """Rows [.., D] of stored rows: [L, N] of one KV head, or [B, K, T, N] of all (head None)."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """What encoding and what decoding multiplies by, each as long as the calibrated amax; see `kernels.layout`."""

    def _calibrated(self, like: Tensor, head: int | Tensor | None) -> Tensor:
        """The calibrated amax, in a shape that multiplies rows: [1], or [K, 1, 1] for all heads of [B, K, T, .]."""
        assert self.amax is not None
        amax = self.amax.to(like.device, torch.float32)
        if len(amax) == 1:
            return amax
        return amax[:, None, None] if head is None else amax[head]


@dataclass(frozen=True)
class _Scaled(RowFormat):
    """One scale a row, or one for all rows: eight bits a value."""

    def row_bytes(self, dim: int) -> int:
        """A byte a value, and four for the scale if rows have their own."""
        return sizes.row_bytes("fp8", dim, per_row=self.amax is None)

    def encode(self, rows: Tensor) -> Tensor:
        """See `RowFormat`."""
        rows = rows.float()
        if self.amax is not None:
            return self._codes(rows * self._scale(self._calibrated(rows, None)))
        scale = self._scale(rows.abs().amax(-1, keepdim=True))
        return torch.cat([self._codes(rows * scale), scale.view(torch.uint8)], dim=-1)

    def decode(
        self, stored: Tensor, dim: int, dtype: torch.dtype, head: int | Tensor | None = None
    ) -> Tensor:
        """See `RowFormat`."""
        if self.amax is not None:
            scale = self._scale(self._calibrated(stored, head))
        else:
            scale = stored[..., dim:].contiguous().view(torch.float32)
        return self._unscale(self._values(stored[..., :dim]), scale).to(dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """See `RowFormat`."""
        assert self.amax is not None
        scale = self._scale(self.amax.float())
        return scale, 1 / scale

    @abstractmethod
    def _scale(self, amax: Tensor) -> Tensor: ...

    @abstractmethod
    def _codes(self, scaled: Tensor) -> Tensor: ...

    @abstractmethod
    def _values(self, codes: Tensor) -> Tensor: ...

    @abstractmethod
    def _unscale(self, values: Tensor, scale: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Fp8(_Scaled):
    """FP8 e4m3."""

    name = "fp8"

    def _scale(self, amax: Tensor) -> Tensor:
        return E4M3_MAX / torch.where(amax <= SMALLEST_AMAX, 1.0, amax)

    def _codes(self, scaled: Tensor) -> Tensor:
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)

    def _values(self, codes: Tensor) -> Tensor:
        return codes.contiguous().view(torch.float8_e4m3fn).float()

    def _unscale(self, values: Tensor, scale: Tensor) -> Tensor:
        return values * (1 / scale)


@dataclass(frozen=True)
class Int8(_Scaled):
    """Symmetric int8."""

    name = "int8"

    def _scale(self, amax: Tensor) -> Tensor:
        # A number divided by a tensor is rounded twice, a tensor by a tensor once: to the last bit ModelOpt's way, here
        # and in FP8.
        return torch.tensor(INT8_MAX, device=amax.device) / torch.where(
            amax <= SMALLEST_AMAX, 1.0, amax
        )

    def _codes(self, scaled: Tensor) -> Tensor:
        return scaled.round().clamp(-INT8_MAX - 1, INT8_MAX).to(torch.int8).view(torch.uint8)

    def _values(self, codes: Tensor) -> Tensor:
        return codes.contiguous().view(torch.int8).float()

    def _unscale(self, values: Tensor, scale: Tensor) -> Tensor:
        return values / scale


@dataclass(frozen=True)
class Nvfp4(RowFormat):
    """NVFP4: e2m1 values, two a byte, blocks of 16 with an e4m3 scale, and one float32 scale for all (from amax).

    The stored row is the packed values, low nibble first, and then the block scales.
    """

    name = "nvfp4"

    def row_bytes(self, dim: int) -> int:
        """Half a byte a value, and a byte a block."""
        return sizes.row_bytes("nvfp4", dim)

    def encode(self, rows: Tensor) -> Tensor:
        """See `RowFormat`."""
        dim = rows.shape[-1]
        double_scale = self._double_scale(rows, None)
        blocks = F.pad(rows.float(), (0, -dim % BLOCK)).unflatten(-1, (-1, BLOCK))
        scale = blocks.abs().amax(-1) / (E2M1_MAX * double_scale)
        scale = torch.where(scale == 0, 1.0, scale).clamp(SMALLEST_BLOCK_SCALE, E4M3_MAX)
        scale = scale.to(torch.float8_e4m3fn)
        codes = _to_e2m1(blocks / (scale.float() * double_scale)[..., None]).flatten(-2)
        packed = (codes[..., 1::2] << 4) | codes[..., 0::2]
        return torch.cat([packed[..., : -(-dim // 2)], scale.view(torch.uint8)], dim=-1)

    def decode(
        self, stored: Tensor, dim: int, dtype: torch.dtype, head: int | Tensor | None = None
    ) -> Tensor:
        """See `RowFormat`."""
        packed, scale = stored.split([-(-dim // 2), -(-dim // BLOCK)], dim=-1)
        codes = torch.stack([packed & 0x0F, packed >> 4], dim=-1).flatten(-2)
        values = _E2M1.to(stored.device)[codes.int()]
        blocks = F.pad(values, (0, scale.shape[-1] * BLOCK - values.shape[-1])).unflatten(
            -1, (-1, BLOCK)
        )
        scale = scale.contiguous().view(torch.float8_e4m3fn).float() * self._double_scale(
            stored, head
        )
        return (blocks * scale[..., None]).flatten(-2)[..., :dim].to(dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """See `RowFormat`."""
        assert self.amax is not None
        double_scale = self.amax.float() / (E2M1_MAX * E4M3_MAX)
        return double_scale, double_scale

    def _double_scale(self, like: Tensor, head: int | Tensor | None) -> Tensor:
        return self._calibrated(like, head) / (E2M1_MAX * E4M3_MAX)


def _to_e2m1(scaled: Tensor) -> Tensor:
    """Codes of the nearest e2m1 values, ties to the even code."""
    magnitude = scaled.abs().contiguous()
    bounds = _E2M1_BOUNDS.to(scaled.device)
    code = torch.searchsorted(bounds, magnitude, out_int32=True).to(torch.uint8)
    code += (magnitude[..., None] == bounds[[1, 3, 5]]).any(-1)
    return code + ((scaled < 0).to(torch.uint8) << 3)
