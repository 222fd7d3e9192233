# SPDX-License-Identifier: Apache-2.0
"""What ModelOpt knows of DMS: the mode "dms", and NVFP4 without a GPU. Importing this registers both.

It is imported while ModelOpt is (see `registering`), so everything else of ours is imported where it is used.
"""

from importlib import import_module
from typing import Any

from modelopt.torch.opt.mode import (
    ConvertEntrypoint,
    ModeDescriptor,
    RestoreEntrypoint,
    _ModeRegistryCls,
)
from modelopt.torch.quantization.nn.modules.tensor_quantizer import register_quant_backend
from torch import Tensor

MODE_NAME = "dms"
NVFP4_BACKEND = "modelopt_dms_nvfp4"

KVSparsityModeRegistry = _ModeRegistryCls("kv_sparsity")


@KVSparsityModeRegistry.register_mode
class DMSModeDescriptor(ModeDescriptor):
    """The mode "dms": gates on every full-attention layer. Apply it before quantization."""

    @property
    def name(self) -> str:
        """Name under which ModelOpt saves the mode."""
        return MODE_NAME

    @property
    def config_class(self) -> type[Any]:
        """Schema of the mode's config: `DMSConfig`."""
        found: type[Any] = import_module("modelopt_dms.config").DMSConfig
        return found

    @property
    def convert(self) -> ConvertEntrypoint:
        """Entry point for applying the mode."""
        entry: ConvertEntrypoint = import_module("modelopt_dms.mode").convert
        return entry

    @property
    def restore(self) -> RestoreEntrypoint:
        """Entry point for applying a saved mode; weights come after it."""
        entry: RestoreEntrypoint = import_module("modelopt_dms.mode").restore
        return entry


def _fake_nvfp4(inputs: Tensor, quantizer: Any) -> Tensor:
    out: Tensor = import_module("modelopt_dms.quantization").fake_nvfp4(inputs, quantizer)
    return out


register_quant_backend(NVFP4_BACKEND, _fake_nvfp4)
