# SPDX-License-Identifier: Apache-2.0
"""A KV cache whose DMS layers draw their pages from one pool, with limits known to the user."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from modelopt_dms.cache import DMSLayer
from modelopt_dms.convert import dms_modules
from modelopt_dms.kv_format import kv_formats
from modelopt_dms.ops.paged import PAGE
from modelopt_dms.paging import PagedSlots, SharedPool


class DMSCache(DynamicCache):
    """A cache for `generate` and plain forwards of a DMS model, in pages; on CUDA, a DynamicCache becomes the same.

    What this adds: a limit in bytes, tables that never move, pages that come back from finished sequences.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_size: int,
        max_length: int,
        max_cache_bytes: int | None = None,
        impl: str = "auto",
    ) -> None:
        """Make an empty cache.

        Args:
            model: a DMS model.
            batch_size: sequences.
            max_length: tokens of a sequence, prompt included.
            max_cache_bytes: size of the pool on each device, taken at the first forward; None lets it grow as it must.
            impl: "triton" (kernels), "reference" (plain PyTorch) or "auto" (kernels on CUDA).

        Raises:
            ValueError: the model is not converted, or a number is not positive.
        """
        super().__init__(config=model.config)
        modules = dms_modules(model)
        if not modules:
            raise ValueError(f"{type(model).__name__} has no gates; call apply_dms (or compress) first")
        sizes = {"batch_size": batch_size, "max_length": max_length, "max_cache_bytes": max_cache_bytes}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.batch_size, self.max_length = batch_size, max_length
        self.pools: dict[torch.device, SharedPool] = {}
        for module in modules.values():
            device = next(module.parameters()).device
            if device not in self.pools:
                self.pools[device] = SharedPool(
                    device, impl, batch_size, -(-max_length // PAGE), max_cache_bytes
                )
            gate, formats = module.dms_gate, kv_formats(module)
            slots = PagedSlots(gate.window, gate.shift, self.pools[device], formats)
            self.layers[module.layer_idx] = DMSLayer(slots, formats)
