# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention layer with decisions: the layer, its backend, and the op that torch.compile does not look into."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from modelopt_dms.kernels.layout import PAGE
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.serving.vllm.config import ModelRules, options_of
from modelopt_dms.serving.vllm.names import FP8_CACHES
from modelopt_dms.serving.vllm.scheduling import DMSSpec
from modelopt_dms.serving.vllm.slabs import NewTokens


@dataclass
class DMSMetadata(AttentionMetadata):
    """What a step consists of.

    Attributes:
        starts: of each request's tokens [requests + 1].
        first_blocks: of the requests' slabs, by which they are known; 0 where vLLM only warms up.
        work: the same by request, once the first layer has asked.
    """

    starts: list[int]
    first_blocks: list[int]
    work: "Work | None" = None


@dataclass(frozen=True)
class Work:
    """What layers do with the tokens of a step.

    Attributes:
        chunks: requests with several tokens, and which these are.
        singles: requests with one token, or one and a draft.
        counts: of their tokens.
        tokens: which these are [sum of counts] int64.
    """

    chunks: list[tuple[str, slice]]
    singles: list[str]
    counts: list[int]
    tokens: Tensor

    @staticmethod
    def of(
        requests: Sequence[str], starts: Sequence[int], drafted: Sequence[bool], like: Tensor
    ) -> "Work":
        """From the requests of a step, their tokens, whether they bring drafts, and a tensor on the device."""
        chunks, singles, counts = [], [], []
        tokens: list[int] = []
        for i, request in enumerate(requests):
            start, end = starts[i : i + 2]
            if drafted[i] or end - start == 1:
                singles.append(request)
                counts.append(end - start)
                tokens += range(start, end)
            else:
                chunks.append((request, slice(start, end)))
        return Work(chunks, singles, counts, torch.tensor(tokens, device=like.device))


class DMSMetadataBuilder(AttentionMetadataBuilder[DMSMetadata]):
    """From vLLM's own description of a step."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """See the base class."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DMSMetadata:
        """The same for all layers."""
        requests = common_attn_metadata.num_reqs
        return DMSMetadata(
            common_attn_metadata.query_start_loc_cpu[: requests + 1].tolist(),
            common_attn_metadata.block_table_tensor[:requests, 0].tolist(),
        )


class DMSImpl(AttentionImpl[DMSMetadata]):
    """Attention of one layer over the slabs of the rank."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """See the base class.

        Raises:
            ValueError: attention that DMS does not implement.
        """
        refused = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "another layer's keys": kv_sharing_target_layer_name,
        }
        for what, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"a layer with {what} ({value}) is not supported by the vLLM plug-in: every layer must be full "
                    "attention with a gate of its own"
                )
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale = scale
        self.scoring = Scoring(scale, logits_soft_cap or None, sinks)

    def forward(
        self, layer_name: str, new: NewTokens, metadata: DMSMetadata, output: Tensor
    ) -> None:
        """Attention of the tokens of a step, request by request where it has several, else all at once.

        Args:
            layer_name: of the layer.
            new: T tokens.
            metadata: whose tokens they are.
            output: [T, H, Dv], is written.
        """
        if not any(metadata.first_blocks):
            output.zero_()  # vLLM warms up, with requests that hold nothing
            return
        connector: Any = get_kv_transfer_group()
        slabs, layer = connector.slabs, connector.layers[layer_name]
        if metadata.work is None:
            requests = connector.requests_of(metadata.first_blocks)
            drafted = [bool(slabs.held[x].draft) for x in requests]
            metadata.work = Work.of(requests, metadata.starts, drafted, output)
        work = metadata.work
        for request, part in work.chunks:
            output[part] = slabs.chunk(layer, request, new[part], self.scoring)
        if work.singles:
            some = new[work.tokens]
            output[work.tokens] = slabs.decode(layer, work.singles, work.counts, some, self.scoring)


class DMSBackend(AttentionBackend):
    """Names the parts to vLLM."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *FP8_CACHES]

    @staticmethod
    def get_name() -> str:
        """The name that vLLM has for backends that it does not know."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[DMSImpl]:
        """See there."""
        return DMSImpl

    @staticmethod
    def get_builder_cls() -> type[DMSMetadataBuilder]:
        """See there."""
        return DMSMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Blocks are not split."""
        return [PAGE]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All layers and heads of a block adjoin, so that each can use the pages of any other."""
        return (KVCacheLayout.BLHNC,)


class DMSAttention(Attention):
    """vLLM's attention layer, with the decisions about its tokens as an argument."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See the base class."""
        super().__init__(*args, attn_backend=DMSBackend, **kwargs)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, evict: Tensor) -> Tensor:
        """Attention [T, H * Dv] of queries [T, H * Dk], keys [T, K * Dk], values [T, K * Dv], decisions [T, K]."""
        query = query.view(-1, self.num_heads, self.head_size)
        key = key.view(-1, self.num_kv_heads, self.head_size)
        value = value.view(-1, self.num_kv_heads, self.head_size_v)
        output = torch.empty(
            *query.shape[:2], self.head_size_v, dtype=query.dtype, device=query.device
        )
        torch.ops.vllm.modelopt_dms_attention(query, key, value, evict, output, self.layer_name)
        return output.flatten(1)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> DMSSpec:
        """Lists of this layer's heads."""
        rules = ModelRules.of(vllm_config.model_config.hf_config)
        return DMSSpec(
            block_size=PAGE,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            window=rules.window,
            protect_first=rules.protect_first,
            evicted_share=rules.evicted_share,
            chunk=vllm_config.scheduler_config.max_num_batched_tokens,
            max_request_blocks=options_of(vllm_config).get("max_request_blocks"),
        )


def _attention(
    query: Tensor, key: Tensor, value: Tensor, evict: Tensor, output: Tensor, layer_name: str
) -> None:
    context = get_forward_context()
    metadata = context.attn_metadata
    if isinstance(metadata, dict):
        metadata = metadata[layer_name]
    if metadata is None:
        output.zero_()  # vLLM looks how much memory a step takes
        return
    tokens = metadata.starts[-1]
    new = NewTokens(query, key, value, evict)[:tokens]
    layer: Any = context.no_compile_layers[layer_name]
    layer.impl.forward(layer_name, new, metadata, output[:tokens])


def _no_attention(
    query: Tensor, key: Tensor, value: Tensor, evict: Tensor, output: Tensor, layer_name: str
) -> None:
    """What it looks like to a compiler."""


if not hasattr(torch.ops.vllm, "modelopt_dms_attention"):
    direct_register_custom_op(
        op_name="modelopt_dms_attention",
        op_func=_attention,
        mutates_args=["output"],
        fake_impl=_no_attention,
    )
