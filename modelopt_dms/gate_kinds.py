# SPDX-License-Identifier: Apache-2.0
"""Gates that read something else than the attention's input: a borrowed query dimension, or the residual stream."""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_dms.config import DMSConfig
from modelopt_dms.gate import EvictionGate, hidden_input


class NeuronGate(EvictionGate):
    """Reads one dimension of the first query head of each KV group as the logit, and keeps attention from using it.

    Adds no parameter: what learns is the query projection. Source: paper section 3.1.
    """

    def __init__(
        self, config: DMSConfig, layer_idx: int, kv_heads: int, q_proj: nn.Linear, head_dim: int
    ) -> None:
        """Borrow from `q_proj` [H * D, C].

        Args:
            config: the model's DMS facts.
            layer_idx: index of the layer in the model.
            kv_heads: K, decisions a token.
            q_proj: the layer's query projection.
            head_dim: D.
        """
        super().__init__(config, layer_idx, kv_heads, q_proj.in_features)
        self.borrowed_dim = config.neuron_dim
        heads = q_proj.out_features // head_dim
        self.borrowed_heads = range(0, heads, heads // kv_heads)
        self.borrowed = [head * head_dim + config.neuron_dim for head in self.borrowed_heads]
        # In a list, so that the projection is not registered (and saved) a second time under the gate.
        self._q_proj = [q_proj]

    def attach(self) -> None:
        """Start silencing the borrowed dimension of the query projection."""
        self._q_proj[0].register_forward_hook(self._silence)

    def logits(self, hidden: Tensor) -> Tensor:
        """Eviction logits [B, K, T] in float32 from hidden states [B, T, C]."""
        q_proj: Any = self._q_proj[0]
        weight = q_proj.weight
        # ModelOpt's: decide by what the quantized projection computes.
        if hasattr(q_proj, "weight_quantizer"):
            hidden, weight = q_proj.input_quantizer(hidden), q_proj.weight_quantizer(weight)
        bias = None if q_proj.bias is None else q_proj.bias[self.borrowed].float()
        z = F.linear(hidden.float(), weight[self.borrowed].float(), bias)
        z = self.scale * z - self.offset
        if self.threshold.numel() == 1:
            z = z.mean(-1, keepdim=True)
        return z.transpose(1, 2)

    def _silence(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.enabled:
            return output
        keep = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device)
        keep[self.borrowed] = 0
        return output * keep

    def silence_rotated(self, query: Tensor) -> Tensor:
        """Zero the borrowed dimension [B, H, T, D] again after RoPE has mixed its partner into it."""
        if not self.enabled:
            return query
        keep = torch.ones(
            query.shape[1], 1, query.shape[-1], dtype=query.dtype, device=query.device
        )
        keep[list(self.borrowed_heads), :, self.borrowed_dim] = 0
        return query * keep


class ResidualGate(EvictionGate):
    """Reads the residual stream before the layer's own norm, through a root-mean-square norm of its own.

    Source: NVIDIA's Model-Optimizer, experimental/dms (`dms_proj_alpha`, `dms_proj_alpha_norm`).
    """

    def __init__(
        self,
        config: DMSConfig,
        layer_idx: int,
        kv_heads: int,
        hidden_size: int,
        layer: nn.Module,
        eps: float,
    ) -> None:
        """Read what enters `layer`.

        Args:
            config: the model's DMS facts.
            layer_idx: index of the layer in the model.
            kv_heads: K, decisions a token.
            hidden_size: C, width of the residual stream.
            layer: the decoder layer around the attention module; its first argument is the residual stream.
            eps: of the norm.
        """
        super().__init__(config, layer_idx, kv_heads, hidden_size)
        self.norm = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))
        self.eps = eps
        # In a list, so that the layer does not become a part of its own part.
        self._layer = [layer]
        self._residual: weakref.ref[Tensor] | None = None

    def attach(self) -> None:
        """Start seeing what enters the layer."""
        self._layer[0].register_forward_pre_hook(self._see, with_kwargs=True)

    def forget(self) -> None:
        """Drop the residual stream of one forward."""
        self._residual = None

    def features(self, hidden: Tensor) -> Tensor:
        """The normed residual stream [B, T, C] in float32; the hidden states that attention gets are not used."""
        residual = None if self._residual is None else self._residual()
        assert residual is not None, "the attention module ran outside of its decoder layer"
        x = residual.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * self.norm

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Weak: the layer (and, until the backward pass, what recomputes it) holds its input anyway.
        residual = hidden_input(args, kwargs)
        self._residual = weakref.ref(residual)
