# SPDX-License-Identifier: Apache-2.0
"""The control channel: workers tell what their lists hold, the scheduler tells what each request may use.

vLLM's KV connector is the one place where a plug-in can add data to both directions of every step; no KV is moved.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from modelopt_dms.kernels.layout import PAGE
from modelopt_dms.kernels.number_formats import E4M3_MAX, Fp8
from modelopt_dms.serving.vllm.accounting import Usage
from modelopt_dms.serving.vllm.config import ModelRules
from modelopt_dms.serving.vllm.drafts import Step
from modelopt_dms.serving.vllm.names import FP8_CACHES, LOG
from modelopt_dms.serving.vllm.scheduling import DMSManager
from modelopt_dms.serving.vllm.slab_tables import Rules, SlabShape
from modelopt_dms.serving.vllm.slabs import Grant, Slabs

logger = init_logger(LOG)


@dataclass
class ToWorkers(KVConnectorMetadata):
    """What the scheduler says before a step.

    Attributes:
        grants: slabs that changed.
        gone: requests that lost theirs.
        steps: what the requests get that get tokens.
    """

    grants: dict[str, Grant]
    gone: set[str]
    steps: dict[str, Step]


@dataclass
class FromWorkers(KVConnectorWorkerMetadata):
    """What workers say after it: epoch, tokens taken in, and usage by rank, of every request."""

    reports: dict[str, tuple[int, int, dict[str, Usage]]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "FromWorkers":
        """Both."""
        assert isinstance(other, FromWorkers)
        reports = dict(self.reports)
        for request, (epoch, tokens, usage) in other.reports.items():
            if request in reports:
                before = reports[request]
                assert before[:2] == (epoch, tokens), f"ranks disagree about {request}"
                usage = before[2] | usage
            reports[request] = (epoch, tokens, usage)
        return FromWorkers(reports)


class DMSConnector(KVConnectorBase_V1, SupportsHMA):
    """Both ends of it."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """See the base class."""
        super().__init__(vllm_config, role, kv_cache_config)
        self.manager: DMSManager | None = None
        self.slabs: Slabs | None = None
        self.layers: dict[str, int] = {}
        self._scheduled: list[str] = []
        self._request_of: dict[int, str] = {}
        self.ever_forced = 0  # requests whose tokens were evicted by force
        self._forced: set[str] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed on."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Always: what attention does depends on numbers of the step, which a captured graph would keep."""
        return True

    # The scheduler's end.

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Find the manager of the slabs."""
        (manager,) = kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, DMSManager)
        self.manager = manager

    def build_connector_meta(self, scheduler_output: Any) -> ToWorkers:
        """What changed since the last step."""
        assert self.manager is not None
        grants, gone = self.manager.take_grants()
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduler_output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
        drafts = scheduler_output.scheduled_spec_decode_tokens
        steps = {
            request: Step(computed[request], len(drafts.get(request, ())))
            for request in scheduler_output.num_scheduled_tokens
        }
        return ToWorkers(grants, gone, steps)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take in the reports of all workers."""
        found = connector_output.kv_connector_worker_meta
        if not isinstance(found, FromWorkers):
            return
        assert self.manager is not None
        for request, (epoch, tokens, usage) in found.reports.items():
            if request not in self.manager.ledger:
                continue  # it has finished
            self.manager.settle(request, epoch, tokens, usage)
            forced = max(x.forced for x in usage.values())
            if forced and request not in self._forced:
                logger.warning(
                    "Request %s holds all blocks that it may (%d of %d tokens): its oldest are evicted by force.",
                    request,
                    self.manager.ledger.limit,
                    PAGE,
                )
                self._forced.add(request)
                self.ever_forced += 1

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Nothing comes from elsewhere."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing to do: `DMSManager` has seen it."""

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may be freed at once."""
        self._forced.discard(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Likewise."""
        return self.request_finished(request, [])

    # The workers' end.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Take vLLM's buffer as one pool of single-head pages: all key pages first, then all value pages.

        Nobody else reads it, and kernels want keys and values each in one piece.

        Args:
            kv_caches: by layer [blocks, K, PAGE, Dk + Dv], interleaved so that a block's layers and heads adjoin.

        Raises:
            RuntimeError: they lie otherwise.
        """
        names = sorted(kv_caches, key=lambda x: kv_caches[x].storage_offset())
        first = kv_caches[names[0]]
        blocks, heads, page, width = first.shape
        lists = len(names) * heads
        expected = (lists * page * width, page * width, width, 1)
        offsets = [kv_caches[x].storage_offset() - first.storage_offset() for x in names]
        wanted = [i * heads * page * width for i in range(len(names))]
        if (
            page != PAGE
            or any(x.stride() != expected for x in kv_caches.values())
            or offsets != wanted
        ):
            raise RuntimeError(
                f"vLLM's KV cache lies otherwise than expected: {len(names)} layers {tuple(first.shape)}, strides "
                f"{first.stride()}; VLLM_KV_CACHE_LAYOUT must be unset or BLHNC"
            )
        rules = ModelRules.of(self._vllm_config.model_config.hf_config)
        layer = self._vllm_config.compilation_config.static_forward_context[names[0]]
        if layer.kv_cache.data_ptr() != first.data_ptr():
            raise RuntimeError(
                "an engine that failed to start has left its KV connector in this process; start the process anew"
            )
        self.layers = {name: i for i, name in enumerate(names)}
        rows = blocks * lists * page
        buffer = first.as_strided((rows * width,), (1,))
        shape = SlabShape(
            len(names),
            heads,
            self._vllm_config.scheduler_config.max_num_seqs,
            self._vllm_config.num_speculative_tokens,
        )
        form = None
        if self._vllm_config.cache_config.cache_dtype in FP8_CACHES:
            form = Fp8(torch.tensor([E4M3_MAX], device=buffer.device))  # scale 1
            buffer = buffer.view(torch.uint8)
        dims = (layer.head_size, layer.head_size_v)
        keys, values = (
            x.view(-1, page, dim)
            for x, dim in zip(buffer.split([rows * x for x in dims]), dims, strict=True)
        )
        kept = Rules(rules.window, rules.shift, rules.protect_first)
        self.slabs = Slabs(keys, values, shape, kept, form)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before a step: take in what changed."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, ToWorkers) and self.slabs is not None
        steps = connector_metadata.steps
        self.slabs.update(connector_metadata.grants, connector_metadata.gone, steps)
        self._scheduled = list(steps)
        self._request_of = {self.slabs.held[x].grant.blocks[0]: x for x in steps}

    def requests_of(self, first_blocks: Sequence[int]) -> list[str]:
        """The requests of a step whose slabs start with these blocks."""
        return [self._request_of[x] for x in first_blocks]

    def build_connector_worker_meta(self) -> FromWorkers | None:
        """After a step: what the lists hold now."""
        if self.slabs is None or not self._scheduled:
            return None
        rank = str(self._vllm_config.parallel_config.rank)
        found = self.slabs.usage(self._scheduled)
        return FromWorkers({x: (epoch, n, {rank: usage}) for x, (epoch, n, usage) in found.items()})

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""
