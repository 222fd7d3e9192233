# SPDX-License-Identifier: Apache-2.0
"""Gates that read something else than the attention's input: a borrowed query dimension, or the residual stream."""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.gates import handover
from modelopt_dms.gates.gate import EvictionGate, hidden_input, in_float32

# Inputs of layers whose backward pass is to come, by gate. Weak: whatever recomputes a layer holds its input.
_TRAINING: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Tensor]]] = (
    weakref.WeakKeyDictionary()
)


class NeuronGate(EvictionGate):
    """Reads one dimension of the first query head of each KV group as the logit, and keeps attention from using it.

    Adds no parameter: what learns is the query projection. Source: paper section 3.1.
    """

    def __init__(
        self, config: DMSConfig, layer_idx: int, kv_heads: int, q_proj: nn.Linear, head_dim: int
    ) -> None:
        """Borrow from the query projection `q_proj` [H * D, C]."""
        super().__init__(config, layer_idx, kv_heads, q_proj.in_features)
        self.borrowed_dim = config.neuron_dim
        heads_apart = q_proj.out_features // head_dim // kv_heads
        self.borrowed_heads = slice(0, None, heads_apart)
        # A slice, not indices: those would be copied to the device at every call.
        self.borrowed = slice(config.neuron_dim, None, heads_apart * head_dim)
        # In lists, so that neither is registered (and saved) a second time under the gate.
        self._attention: list[Any] = []
        self._zeroed: list[nn.Module] = []

    def attach(self, module: Any) -> list[RemovableHandle]:
        """Start silencing the borrowed dimension of the query projection."""
        self._attention = [module]
        return self._follow()

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The hidden states that attention gets."""
        self._follow()
        return super().read(args, kwargs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Eviction logits [B, K, T] in float32 from hidden states [B, T, C]."""
        with in_float32(hidden.device):
            z = self.scale * self._projected(hidden) - self.offset
        if self.threshold.numel() == 1:
            z = z.mean(-1, keepdim=True)
        return z.transpose(1, 2)

    def _projected(self, hidden: Tensor) -> Tensor:
        """The borrowed outputs [B, T, K] in float32 of the query projection, whatever stands there now."""
        q_proj = self._attention[0].q_proj
        if type(q_proj) is nn.Linear and "forward" not in vars(q_proj):
            bias = None if q_proj.bias is None else q_proj.bias[self.borrowed].float()
            return F.linear(hidden.float(), q_proj.weight[self.borrowed].float(), bias)
        # An adapter, quantizers, or weights that accelerate brings: only the layer knows what it computes. Past its
        # hooks, because `_zero_borrowed` is one of them.
        return q_proj.forward(hidden)[..., self.borrowed].float()

    def _follow(self) -> list[RemovableHandle]:
        """Silence what is the query projection now: peft puts another module in its place, and takes it away again."""
        q_proj = self._attention[0].q_proj
        if self._zeroed and self._zeroed[0] is q_proj:
            return []
        self._zeroed = [q_proj]
        hooks = q_proj._forward_hooks.values()
        if any(getattr(hook, "__self__", None) is self for hook in hooks):
            return []
        return [q_proj.register_forward_hook(self._zero_borrowed)]

    def _zero_borrowed(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # What is not the whole projection (any longer) is the part of one that is zeroed itself.
        if not self.enabled or module is not self._attention[0].q_proj:
            return output
        keep = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device)
        keep[self.borrowed].zero_()
        return output * keep

    def zero_borrowed_dim_rotated(self, query: Tensor) -> Tensor:
        """Zero the borrowed dimension [B, H, T, D] again after RoPE has mixed its partner into it."""
        if not self.enabled:
            return query
        keep = torch.ones(
            query.shape[1], 1, query.shape[-1], dtype=query.dtype, device=query.device
        )
        keep[self.borrowed_heads, :, self.borrowed_dim].zero_()
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
        """Read what enters `layer`, the decoder layer around the attention module, as its first argument."""
        super().__init__(config, layer_idx, kv_heads, hidden_size)
        self.norm = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))
        self.eps = eps
        # In a list, so that the layer does not become a part of its own part.
        self._layer = [layer]

    def attach(self, module: Any) -> list[RemovableHandle]:
        """Start seeing what enters the layer."""
        return [self._layer[0].register_forward_pre_hook(self._see, with_kwargs=True)]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The residual stream [B, T, C] that entered the layer; the hidden states that attention gets are not used.

        Raises:
            RuntimeError: this thread has not run the layer around the attention module.
        """
        hidden = hidden_input(args, kwargs)
        residual = handover.get(self)
        if residual is None:
            residual = self._recomputed(hidden)
        if residual is None:
            raise RuntimeError(
                f"the attention of layer {self.layer_idx} ran outside of its decoder layer, whose input its gate reads"
            )
        # Hooks run before accelerate's wrapper has moved the layer's inputs.
        return residual.to(hidden.device)

    def clear(self) -> None:
        """Drop the residual stream of one forward."""
        handover.take(self)

    def features(self, hidden: Tensor) -> Tensor:
        """The normed residual stream [B, T, C] in float32."""
        x = hidden.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * self.norm

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        residual = hidden_input(args, kwargs)
        handover.put(self, residual)
        if module.training and self.enabled and torch.is_grad_enabled():
            living = [x for x in _TRAINING.get(self, ()) if x() is not None]
            _TRAINING[self] = [*living, weakref.ref(residual)]

    def _recomputed(self, hidden: Tensor) -> Tensor | None:
        """The residual stream of a checkpointed layer that is run again, past its hooks, in the backward pass."""
        found = [x() for x in _TRAINING.get(self, ())]
        living = [x for x in found if x is not None and x.shape == hidden.shape]
        if len(living) > 1:
            raise RuntimeError(
                f"layer {self.layer_idx}: {len(living)} forward passes wait for their backward pass; with "
                "dms.gate='residual' and gradient checkpointing, call backward() after each"
            )
        return living[0] if living else None
