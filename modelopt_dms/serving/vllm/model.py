# SPDX-License-Identifier: Apache-2.0
"""vLLM's Transformers backend with a gate in every attention layer: any architecture that it runs without help.

A gate is a hook in front of its attention module, which adds the decisions to the keyword arguments that transformers
hands on to the attention function; so they are plain values of the graph that torch.compile sees.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.transformers import (
    TransformersForCausalLM,
    TransformersMoEForCausalLM,
)
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR, Base

from modelopt_dms.checkpoints.lost_gates import gates_put_on_later
from modelopt_dms.gates.gate import hidden_input
from modelopt_dms.kernels.gating import LinearGate
from modelopt_dms.serving.vllm.attention import DMSAttention
from modelopt_dms.serving.vllm.config import ModelRules
from modelopt_dms.serving.vllm.names import ATTENTION

EVICT, RESIDUAL = "dms_evict", "dms_residual"


class RankGate(nn.Module):
    """A layer's gate for the KV heads of this rank; what they mean: `gates.gate.EvictionGate`.

    Shapes: T tokens, K KV heads of the rank, C features.
    """

    def __init__(
        self,
        rules: ModelRules,
        heads: int,
        all_heads: int,
        hidden_size: int,
        eps: float,
        device: Any,
    ) -> None:
        """Make room for weights that the checkpoint brings.

        Args:
            rules: of the model.
            heads: K.
            all_heads: KV heads of the layer.
            hidden_size: C.
            eps: of the norm of a residual gate.
            device: where to.
        """
        super().__init__()
        self.rules, self.heads, self.eps = rules, heads, eps
        self.shared = rules.rows == "layer"
        ranks = get_tensor_model_parallel_world_size()
        self.first = get_tensor_model_parallel_rank() * all_heads // ranks
        rows = 1 if self.shared else heads
        self.weight = self._parameter(rows, hidden_size, device=device)
        self.threshold = self._parameter(rows, device=device)
        if rules.gate == "residual":
            self.norm = self._parameter(hidden_size, device=device)
            self.norm.weight_loader = _load_whole  # type: ignore[attr-defined]

    def _parameter(self, *shape: int, device: Any) -> nn.Parameter:
        made = nn.Parameter(
            torch.empty(shape, dtype=torch.float32, device=device), requires_grad=False
        )
        made.weight_loader = _load_whole if self.shared else self._load_rows  # type: ignore[attr-defined]
        return made

    def _load_rows(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        parameter.data.copy_(loaded[self.first : self.first + self.heads])

    def forward(self, hidden: Tensor) -> Tensor:
        """Decisions [T, K] bool from hidden states [1, T, C]; which tokens are protected, the cache knows."""
        x = hidden[0]
        if self.rules.gate == "residual":
            x = x.float()
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.norm
        if not self.rules.evict:
            return torch.zeros(len(x), self.heads, dtype=torch.bool, device=x.device)
        anywhere = torch.zeros(1, dtype=torch.long, device=x.device)
        gate = LinearGate(
            x, self.weight, self.threshold, anywhere, self.rules.scale, self.rules.offset, protect=0
        )
        return gate.decide(self.heads).contiguous()


def _load_whole(parameter: nn.Parameter, loaded: Tensor) -> None:
    parameter.data.copy_(loaded)


def _decide(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """In front of an attention module: add the decisions about its tokens."""
    hidden = kwargs.pop(RESIDUAL) if RESIDUAL in kwargs else hidden_input(args, kwargs)
    return args, kwargs | {EVICT: module.dms_gate(hidden)}


def _keep_residual(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """In front of a decoder layer: hand its input on to the gate."""
    return args, kwargs | {RESIDUAL: hidden_input(args, kwargs)}


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """As vLLM's attention function for transformers, with the decisions: queries [1, H, T, D] -> [T, H * D].

    Raises:
        ValueError: the attention module did not hand them on.
    """
    if EVICT not in kwargs:
        raise ValueError(
            f"{type(module).__name__} does not hand unknown keyword arguments on to its attention function, so "
            "decisions do not reach it: this architecture is not supported by the vLLM plug-in"
        )
    if kwargs.get("s_aux") is not None and not getattr(module, VLLM_ATTN_ATTR).has_sink:
        raise ValueError(f"{type(module).__name__} has attention sinks that vLLM did not find")
    query, key, value = (x.transpose(1, 2)[0].flatten(1) for x in (query, key, value))
    return getattr(module, VLLM_ATTN_ATTR)(query, key, value, kwargs[EVICT]), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


class GatedBase(Base):
    """What is the same for all our models."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """See the base class."""
        self.rules = ModelRules.of(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _create_hf_to_vllm_mapper(self) -> None:
        """By the names of the architecture that transformers knows."""
        ours, self.config.architectures = self.config.architectures, self.config.dms_architectures
        super()._create_hf_to_vllm_mapper()
        self.config.architectures = ours

    def _get_attn_cls(self) -> type[DMSAttention]:
        return DMSAttention

    def _create_attention_instances(self, prefix: str = "") -> None:
        """Put a gate in every layer of this rank.

        Raises:
            ValueError: an attention that DMS does not serve here.
        """
        if getattr(self.text_config, "kv_lora_rank", None) is not None:
            raise ValueError("latent attention (MLA) is not supported by the vLLM plug-in")
        super()._create_attention_instances(prefix)
        self.text_config._attn_implementation = ATTENTION
        all_heads = self.model_config.get_total_num_kv_heads()
        eps = getattr(self.text_config, "rms_norm_eps", 1e-6)
        for name, _ in self.attention_fusers.values():
            module: Any = self.get_submodule(name)
            attention = getattr(module, VLLM_ATTN_ATTR, None)
            if attention is None:
                continue  # another rank's
            module.dms_gate = RankGate(
                self.rules,
                attention.num_kv_heads,
                all_heads,
                self.text_config.hidden_size,
                eps,
                self.device_config.device,
            )
            module.register_forward_pre_hook(_decide, with_kwargs=True)
            if self.rules.gate == "residual":
                layer = self.get_submodule(name.rpartition(".")[0])
                layer.register_forward_pre_hook(_keep_residual, with_kwargs=True)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As the base class.

        Raises:
            ValueError: a layer has no gate in the checkpoint.
        """
        with gates_put_on_later():  # by us, here: what makes transformers raise must not
            loaded = super().load_weights(weights)
        gates = {name for name, _ in self.named_parameters() if ".dms_gate." in name}
        missing = sorted(gates - loaded)
        if missing:
            raise ValueError(
                f"the checkpoint has no {missing[0]}: the vLLM plug-in serves models with a gate in every layer "
                "(dms.layers=['*'])"
            )
        return loaded


class DMSForCausalLM(GatedBase, TransformersForCausalLM):
    """A text model."""


class DMSMoEForCausalLM(GatedBase, TransformersMoEForCausalLM):
    """A text model with experts."""
