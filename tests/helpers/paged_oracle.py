# SPDX-License-Identifier: Apache-2.0
"""Number formats of caches with two KV heads."""

import torch
from torch import Tensor

from modelopt_dms.kernels.number_formats import Fp8, Int8, Nvfp4, RowFormat

Formats = tuple[RowFormat | None, RowFormat | None]

FORMATS: dict[str, Formats] = {
    "plain": (None, None),
    "fp8": (Fp8(torch.tensor([1.5, 3.0])), Fp8(torch.tensor([2.0]))),
    "fp8 rows": (Fp8(None), Fp8(None)),
    "int8": (Int8(torch.tensor([2.5])), Int8(torch.tensor([1.5, 3.0]))),
    "int8 rows": (Int8(None), Int8(None)),
    "nvfp4": (Nvfp4(torch.tensor([1.5, 3.0])), Nvfp4(torch.tensor([2.0]))),
    "mixed": (Fp8(torch.tensor([2.0])), Nvfp4(torch.tensor([2.0, 1.0]))),
}


def stored(form: RowFormat | None, x: Tensor) -> Tensor:
    """Rows [B, K, T, D] as they are stored."""
    return x if form is None else form.encode(x)
