# SPDX-License-Identifier: Apache-2.0
"""Hidden state -> eviction logit per KV head -> decision, hard or relaxed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modelopt_dms.kernels.gating import Decided, GateInput, LinearGate

if TYPE_CHECKING:  # importing it would import ModelOpt, which takes seconds
    from modelopt_dms.config.dms import DMSConfig


@dataclass
class AlphaRecord:
    """The decisions of one forward pass, by layer index.

    Attributes:
        alphas: relaxed decisions [B, K, T] in [0, 1], with gradient (training mode only).
        hard: decisions at the threshold [B, K, T], bool.
    """

    alphas: dict[int, Tensor] = field(default_factory=dict)
    hard: dict[int, Tensor] = field(default_factory=dict)


class EvictionGate(nn.Module):
    """One attention layer's gate: z = scale * (w . x) - offset for every KV head, in float32 (paper section 3.1).

    Attributes:
        enabled: False while the model must behave as if it had never been converted; always, with dms.evict=False.
        noise_seed: seed of the logistic noise of the next training forward; None for no noise.
        tau: temperature of the relaxed decision.
        moved: what is added to the threshold of the next training forward.
        record: where decisions are recorded, or None.
        observer: told the queries, keys and values of the layer's next attention, and how they are scored; or None.
    """

    def __init__(
        self, config: "DMSConfig", layer_idx: int, kv_heads: int, hidden_size: int
    ) -> None:
        """Make a gate of `kv_heads` decisions a token that evicts nothing yet, for hidden states [.., hidden_size]."""
        super().__init__()
        self.layer_idx = layer_idx
        self.kv_heads = kv_heads
        # Layers of the model, set where the gate is put on.
        self.depth: int | None = None
        self.window = config.window
        self.protect_first = config.protect_first
        self.shift = int(config.decision_shift)
        self.scale = config.scale
        self.offset = config.offset
        rows = 1 if config.granularity == "layer" else kv_heads
        # On a CPU whatever the default device is: on "meta" a gate would have no values.
        made: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        if config.gate != "neuron":
            self.weight = nn.Parameter(torch.zeros(rows, hidden_size, **made))
        self.register_buffer("threshold", torch.full((rows,), config.threshold, **made))
        self.threshold: Tensor
        self.enabled = config.evict
        self.noise_seed: int | None = None
        self.tau = 0.1
        self.moved = 0.0
        self.record: AlphaRecord | None = None
        self.observer: Callable[..., None] | None = None

    def attach(self, module: Any) -> list[RemovableHandle]:
        """Hook into what else the gate reads or zeroes around an attention module; the adapter needs nothing."""
        return []

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the gate reads [B, T, C], from the arguments that the attention module is called with."""
        return hidden_input(args, kwargs)

    def clear(self) -> None:
        """Drop what was staged for one forward."""

    def forward(self, method: str, hidden: Tensor, positions: Tensor) -> Any:
        """Call `decide`, `decide_later` or `relax`, as a module: what others hook onto modules places the weights.

        Args:
            method: name of the method.
            hidden: what `read` gave [B, T, C].
            positions: of the tokens [B or 1, T].

        Raises:
            RuntimeError: the gate has no values, because it is on the meta device.
        """
        held = (*self._parameters.values(), *self._buffers.values())
        if not hidden.is_meta and any(x is not None and x.is_meta for x in held):
            raise RuntimeError(
                f"the gate of layer {self.layer_idx} is on the meta device: its weights were never loaded"
            )
        return getattr(self, method)(hidden, positions)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EvictionGate":
        """As nn.Module's, but `.half()` and `.to(dtype)` move a gate and leave it in float32."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def features(self, hidden: Tensor) -> Tensor:
        """What the logits are linear in [B, T, C], from what `read` gave [B, T, C]."""
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Eviction logits [B, K or 1, T] in float32 from what `read` gave [B, T, C]."""
        with in_float32(hidden.device):
            z = F.linear(self.features(hidden).float(), self.weight.float())
        return self.scale * z.transpose(1, 2) - self.offset  # [B, T, K] -> [B, K, T]

    def decide(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Hard decisions [B, K, T], True to evict, of tokens at positions [B or 1, T]."""
        if not self.enabled:
            B, T = hidden.shape[:2]
            return torch.zeros(B, self.kv_heads, T, dtype=torch.bool, device=hidden.device)
        z = self.logits(hidden)
        evict = (z > self.threshold[:, None]).expand(-1, self.kv_heads, -1)
        evict = evict & self._may_evict(positions)
        self._remember("hard", evict)
        return evict

    def decide_later(self, hidden: Tensor, positions: Tensor) -> GateInput:
        """What a kernel needs to decide about one token a sequence [B, 1, C], or the decisions if it cannot."""
        linear = "weight" in self._parameters and type(self).decide is EvictionGate.decide
        if not self.enabled or self.record is not None or not linear:
            return Decided(self.decide(hidden, positions)[..., 0])
        return LinearGate(
            features=self.features(hidden)[:, 0],
            weight=self.weight,
            threshold=self.threshold,
            positions=positions[:, 0],
            scale=self.scale,
            offset=self.offset,
            protect=self.protect_first + self.shift,
        )

    def relax(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Relaxed decisions as log(1 - alpha) [B, K, T] float32, differentiable (Gumbel-sigmoid)."""
        z = self.logits(hidden) - (self.threshold[:, None] + self.moved)
        allowed = self._may_evict(positions)
        with torch.no_grad():
            self._remember("hard", (z > 0).expand(-1, self.kv_heads, -1) & allowed)
        z = (z + self._noise(z)) / self.tau
        # Below this, exp() underflows to an exact 0 for alpha and its gradient.
        z = torch.where(allowed, z, -1e4).expand(-1, self.kv_heads, -1)
        self._remember("alphas", torch.sigmoid(z))
        return F.logsigmoid(-z)

    def _may_evict(self, positions: Tensor) -> Tensor:
        # With shift 1 a token decides about the one before it.
        return (positions >= self.protect_first + self.shift)[:, None]

    def _noise(self, z: Tensor) -> Tensor | float:
        if self.noise_seed is None:
            return 0.0
        # A generator of its own: the noise is the same when a checkpointed layer is recomputed or a run resumed.
        generator = torch.Generator(z.device).manual_seed(self.noise_seed * 1009 + self.layer_idx)
        uniform = torch.rand(z.shape, generator=generator, device=z.device).clamp(1e-6, 1 - 1e-6)
        return torch.logit(uniform)

    def _remember(self, kind: str, decisions: Tensor) -> None:
        # The first recording counts: a checkpointed layer runs a second time in the backward pass.
        if self.record is not None:
            getattr(self.record, kind).setdefault(self.layer_idx, decisions)


def in_float32(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, autocast does not round what a gate computes."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [B, T, C] that a hooked module of transformers was called with, by position or by name."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def gates(model: nn.Module) -> list[EvictionGate]:
    """All gates of a model, in layer order."""
    return [module for module in model.modules() if isinstance(module, EvictionGate)]


def gate_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of all gates."""
    return [
        (f"{name}.{key}", parameter)
        for name, module in model.named_modules()
        if isinstance(module, EvictionGate)
        for key, parameter in module.named_parameters()
    ]


def set_relaxation(model: nn.Module, seed: int | None, tau: float, moved: float = 0.0) -> None:
    """Fix noise (None is none), temperature and move of the thresholds for every gate's next training forward."""
    for gate in gates(model):
        gate.noise_seed, gate.tau, gate.moved = seed, tau, moved


@contextmanager
def eviction_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one it was before conversion: the teacher."""
    before = [(gate, gate.enabled) for gate in gates(model)]
    try:
        for gate, _ in before:
            gate.enabled = False
        yield
    finally:
        for gate, enabled in before:
            gate.enabled = enabled


@contextmanager
def record_alpha(model: nn.Module) -> Iterator[AlphaRecord]:
    """Record the decisions of one forward pass; read them after it, also under gradient checkpointing."""
    record = AlphaRecord()
    found = gates(model)
    try:
        for gate in found:
            gate.record = record
        yield record
    finally:
        for gate in found:
            gate.record = None
