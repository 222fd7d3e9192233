# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's NVFP4 without a GPU. Importing this registers it.

It is imported while ModelOpt is (see `checkpoints.registration`), so everything else of ours is imported where it is
used.
"""

from importlib import import_module
from typing import Any

from modelopt.torch.quantization.nn.modules.tensor_quantizer import register_quant_backend
from torch import Tensor

NVFP4_BACKEND = "modelopt_dms_nvfp4"


def _fake_nvfp4(inputs: Tensor, quantizer: Any) -> Tensor:
    out: Tensor = import_module("modelopt_dms.quantization.apply").fake_nvfp4(inputs, quantizer)
    return out


register_quant_backend(NVFP4_BACKEND, _fake_nvfp4)
