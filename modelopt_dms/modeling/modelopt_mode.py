# SPDX-License-Identifier: Apache-2.0
"""What ModelOpt knows of DMS: the mode "dms". Importing this registers it.

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

MODE_NAME = "dms"

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
        """Schema of the mode's config: the fields of `DMSConfig`."""
        found: type[Any] = import_module("modelopt_dms.modeling.mode").DMSModeConfig
        return found

    @property
    def convert(self) -> ConvertEntrypoint:
        """Entry point for applying the mode."""
        entry: ConvertEntrypoint = import_module("modelopt_dms.modeling.mode").convert
        return entry

    @property
    def restore(self) -> RestoreEntrypoint:
        """Entry point for applying a saved mode; weights come after it."""
        entry: RestoreEntrypoint = import_module("modelopt_dms.modeling.mode").restore
        return entry
