# SPDX-License-Identifier: Apache-2.0
"""What vLLM's scheduler reserves for a DMS model: a KV cache spec and its manager."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from modelopt_dms.kernels.layout import PAGE
from modelopt_dms.kvcache.reserve import pages_per_list
from modelopt_dms.serving.vllm.accounting import Ledger, Usage, least_blocks
from modelopt_dms.serving.vllm.slabs import Grant


class DMSManager(FullAttentionManager):
    """The slabs of all requests: blocks by the worst case, given back when the workers have told how it was."""

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        block_pool: Any,
        enable_caching: bool,
        *args: Any,
        **kwargs: Any,
    ):
        """As its base class; see there.

        Raises:
            ValueError: prefix caching is on, or the pool is too small for one request.
        """
        if enable_caching:
            raise ValueError(
                "prefix caching does not work with DMS models: what is evicted depends on all tokens of a request"
            )
        super().__init__(kv_cache_spec, block_pool, enable_caching, *args, **kwargs)
        assert isinstance(kv_cache_spec, DMSSpec)
        self.spec = kv_cache_spec
        usable = block_pool.num_gpu_blocks - 1  # one is the null block
        limit = min(usable, kv_cache_spec.max_request_blocks or usable)
        least = least_blocks(kv_cache_spec.window, kv_cache_spec.protect_first, PAGE)
        self.ledger = Ledger(PAGE, limit, least)
        self._changed: set[str] = set()
        self._gone: set[str] = set()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that a request still needs; for its whole prompt, what is expected."""
        if not apply_admission_cap:
            return self.ledger.missing(request_id, num_tokens)
        expected = min(self.spec.blocks_expected(num_tokens), self.ledger.limit)
        return max(0, expected - len(self.req_to_blocks.get(request_id, ())))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Let a slab grow for tokens up to this many; its first blocks, by which workers know it, or none.

        The rest goes through `DMSConnector`: vLLM's own lists on the workers can only grow.
        """
        blocks = self.req_to_blocks[request_id]
        is_first = not blocks
        new = self.block_pool.get_new_blocks(self.ledger.grow(request_id, num_tokens))
        blocks.extend(new)
        self._changed.add(request_id)
        return list(new) if is_first else []

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As its base class."""
        if request_id in self.ledger:
            self.ledger.close(request_id)
            self._gone.add(request_id)
            self._changed.discard(request_id)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is cached."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Nothing is found."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def settle(self, request_id: str, epoch: int, tokens: int, usage: Mapping[str, Usage]) -> None:
        """Take in what all ranks report about a request, and give back blocks from the end of its slab."""
        surplus = self.ledger.settle(request_id, epoch, tokens, usage)
        if surplus:
            blocks = self.req_to_blocks[request_id]
            self.block_pool.free_blocks(reversed(blocks[-surplus:]))
            del blocks[-surplus:]
            self._changed.add(request_id)

    def take_grants(self) -> tuple[dict[str, Grant], set[str]]:
        """The slabs that changed since the last call, and the requests that lost theirs."""
        grants = {}
        for request in self._changed:
            blocks = tuple(x.block_id for x in self.req_to_blocks[request])
            capped = self.ledger.is_capped(request)
            grants[request] = Grant(self.ledger[request].epoch, blocks, capped)
        gone, self._changed, self._gone = self._gone, set(), set()
        return grants, gone


# Registering anything before vLLM has registered its own specs would keep it from doing so.
KVCacheSpecRegistry._ensure_registered()


@register_kv_cache_spec(manager_class=DMSManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class DMSSpec(FullAttentionSpec):
    """A layer whose KV heads keep a number of tokens each.

    Attributes:
        window: delay window.
        protect_first: tokens at the start that are never evicted.
        evicted_share: share of the others that was to be evicted.
        chunk: the most tokens of a prompt that are read at a time.
        max_request_blocks: that one request may hold; None: the whole pool.
    """

    window: int
    protect_first: int
    evicted_share: float
    chunk: int
    max_request_blocks: int | None = None

    @property
    def prefix_cacheable(self) -> bool:
        """Never."""
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        """Slots are found where the rows are."""
        return False

    def blocks_expected(self, tokens: int) -> int:
        """Blocks at the most while and after so many tokens are taken in, if the gates evict as promised.

        The most are reserved for the last chunk of a prompt, none of whose tokens may have been evicted yet.
        """
        last = min(self.chunk, tokens)
        before, after = (
            pages_per_list(x, self.evicted_share, self.window, self.protect_first)
            for x in (tokens - last, tokens)
        )
        dense = -(-tokens // PAGE)
        return min(dense, max(after, before + -(-last // PAGE)))

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Of the longest request, if the gates evict as promised; with less, nothing would start."""
        least = least_blocks(self.window, self.protect_first, PAGE)
        blocks = max(least, self.blocks_expected(vllm_config.model_config.max_model_len))
        return blocks * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list["DMSSpec"]) -> "DMSSpec":
        """The spec that all layers have.

        Raises:
            ValueError: they have not.
        """
        if any(spec != specs[0] for spec in specs):
            raise ValueError(
                "the layers of a DMS model must have the same KV heads, head size and dtype here"
            )
        return specs[0]
