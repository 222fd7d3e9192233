# SPDX-License-Identifier: Apache-2.0
"""A KV cache whose DMS layers draw their pages from one pool, with limits known to the user."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from modelopt_dms.kernels.layout import PAGE
from modelopt_dms.kvcache.hf_cache import DMSLayer, rows_alike
from modelopt_dms.kvcache.kv_format import kv_formats
from modelopt_dms.kvcache.limit import limit_in_bytes
from modelopt_dms.kvcache.page_pool import OnFull, SharedPool
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches
from modelopt_dms.kvcache.reserve import pages_per_list
from modelopt_dms.modeling.convert import dms_modules


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
        max_cache_bytes: int | str | None = None,
        on_full: OnFull = "error",
        impl: str = "auto",
    ) -> None:
        """Make an empty cache.

        Args:
            model: a DMS model.
            batch_size: sequences.
            max_length: tokens of a sequence, prompt included.
            max_cache_bytes: bytes of all pages, "40GiB", or "80%" of what is free on the device now, taken at the
                first forward; None lets the pool grow as it must.
            on_full: when max_cache_bytes are used up, "error" raises OutOfPagesError; with "evict" the longest lists
                lose their oldest tokens, also what the gates want to keep; see `kvcache.forced_eviction`.
            impl: "triton" (kernels), "reference" (plain PyTorch) or "auto" (kernels on CUDA).

        Raises:
            ValueError: the model is not converted, a number is not positive, `impl` cannot run, `on_full` is not known,
                or "evict" has no max_cache_bytes.
        """
        super().__init__(config=model.config)
        modules = list(dms_modules(model).values())
        if not modules:
            raise ValueError(
                f"{type(model).__name__} has no gates; call apply_dms (or compress) first"
            )
        _check_sizes(batch_size=batch_size, max_length=max_length)
        self._sequences, self._longest = batch_size, max_length
        gates = [x.dms_gate for x in modules]
        self._protected = max(x.window for x in gates), max(x.protect_first for x in gates)
        self.pools: list[SharedPool] = []
        groups: dict[Any, list[Any]] = {}
        for module in modules:
            key = (next(module.parameters()).device, rows_alike(kv_formats(module)))
            groups.setdefault(key, []).append(module)
        for (device, _), members in groups.items():
            share = None
            if max_cache_bytes is not None:
                share = limit_in_bytes(max_cache_bytes, device) * len(members) // len(modules)
            pool = SharedPool(
                device,
                impl,
                batch=batch_size,
                width=-(-max_length // PAGE),
                max_bytes=share,
                layers=len(members),
                on_full=on_full,
                protect_first=self._protected[1],
            )
            self.pools.append(pool)
            for module in members:
                gate, formats = module.dms_gate, kv_formats(module)
                slots = PagedHeadCaches(gate.window, gate.shift, pool, formats)
                self.layers[module.layer_idx] = DMSLayer(slots, formats, gate.depth)

    @property
    def is_all_paged(self) -> bool:
        """Whether every layer is a DMS layer."""
        return all(isinstance(layer, DMSLayer) for layer in self.layers)

    @property
    def active(self) -> Tensor:
        """Sequences [B] bool that still take in tokens."""
        return self.pools[0].active

    def check_room(self, batch_size: int, length: int) -> None:
        """Refuse more than was asked for at construction.

        Raises:
            ValueError: another batch size, or longer sequences.
        """
        if batch_size != self._sequences:
            raise ValueError(f"this cache holds {self._sequences} sequences, got {batch_size}")
        if length > self._longest:
            raise ValueError(
                f"sequences may become {length} tokens long, but this cache was made for max_length={self._longest}"
            )

    def advance(self, tokens: int) -> None:
        """A captured graph took in so many tokens of every active sequence (negative: it did not, after all)."""
        for slots in self._slots():
            slots.advance(tokens)

    def release(self, sequences: Tensor) -> None:
        """Finished sequences [B] bool give their pages back and take in nothing more."""
        for pool in self.pools:
            pool.release(sequences.to(pool.device))

    def reserve(self, length: int, evicted_share: float) -> None:
        """Take the pages that sequences of this length should need; nothing where max_cache_bytes is set.

        Args:
            length: tokens of a sequence at the end.
            evicted_share: of its evictable tokens, which will be evicted.
        """
        for pool in self.pools:
            pool.expect(length, pages_per_list(length, evicted_share, *self._protected))

    def make_room(self, tokens: int) -> bool:
        """See to it that tokens (at most PAGE) of every list fit; whether anything moved. Waits for the device.

        Raises:
            OutOfPagesError: max_cache_bytes was not enough, and rows are lost.
        """
        return any([pool.make_room(tokens) for pool in self.pools])

    def check_integrity(self) -> None:
        """Raise AssertionError if pages or slots are shared or lost."""
        for slots in self._slots():
            slots.check_integrity()

    def _slots(self) -> list[PagedHeadCaches]:
        return [x.slots for x in self.layers if isinstance(x, DMSLayer)]  # type: ignore[misc]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
