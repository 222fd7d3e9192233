# SPDX-License-Identifier: Apache-2.0
"""What DMS is compared with: decisions nobody learnt, in the same physical cache or in a plain one that is cut once.

`sliding_window` and `random_eviction` evict while a text is read and written. `cut` evicts once, when a context has
been read and no question is known, as kvpress' presses do; what it keeps is chosen by `keydiff` or `sinks_and_recent`.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.gates.gate import EvictionGate, gates
from modelopt_dms.gates.kinds import NeuronGate
from modelopt_dms.modeling.convert import dms_modules

Model = TypeVar("Model", bound=PreTrainedModel)

SINKS = 4


class PeerGate(EvictionGate):
    """A gate without weights that stands where a learnt one stood."""

    def __init__(self, replaced: EvictionGate, window: int, protect_first: int = 0) -> None:
        config = DMSConfig(window=window, protect_first=protect_first)
        super().__init__(config, replaced.layer_idx, replaced.kv_heads, 1)
        self.enabled = replaced.enabled
        # In a list, so that its parameters do not stay in the model.
        self._replaced = [replaced]
        if isinstance(replaced, NeuronGate):
            # The model learnt to live without the borrowed dimension; it stays silent.
            self.zero_borrowed_dim_rotated = replaced.zero_borrowed_dim_rotated

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the replaced gate would read."""
        return self._replaced[0].read(args, kwargs)

    def clear(self) -> None:
        """Drop what the replaced gate's hooks still stage for it."""
        self._replaced[0].clear()

    def decide(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Hard decisions [B, K, T] of tokens at positions [B or 1, T], however the text is cut."""
        if not self.enabled:
            return super().decide(hidden, positions)
        evict = self.mark(positions) & self._may_evict(positions)
        evict = evict.expand(hidden.shape[0], self.kv_heads, -1)
        self._remember("hard", evict)
        return evict

    def mark(self, positions: Tensor) -> Tensor:
        """Which tokens at positions [B or 1, T] may be forgotten: [B or 1, K or 1, T]."""
        raise NotImplementedError


class SlidingWindowGate(PeerGate):
    """Marks every token: what is left is a sliding window behind the protected first tokens."""

    def mark(self, positions: Tensor) -> Tensor:
        """All tokens: [B or 1, 1, T]."""
        return torch.ones_like(positions, dtype=torch.bool)[:, None]


class RandomGate(PeerGate):
    """Marks a fixed share of tokens, drawn anew for every layer, head and position."""

    def __init__(self, replaced: EvictionGate, evicted_fraction: float, seed: int) -> None:
        super().__init__(replaced, replaced.window)
        self.evicted_fraction = evicted_fraction
        self.seed = seed

    def mark(self, positions: Tensor) -> Tensor:
        """Draws of every head and position: [B or 1, K, T]."""
        heads = torch.arange(self.kv_heads, device=positions.device)
        stream = (self.seed * 4099 + self.layer_idx) * 4099 + heads
        draws = _uniform(stream[:, None], positions[:, None, :])  # [B or 1, K, T]
        return draws < self.evicted_fraction


def _uniform(stream: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1) that looks random for every pair of integers."""
    x = (_hash32(stream + 1) ^ positions.long()) & 0xFFFFFFFF
    return _hash32(x).double() / 2**32


def _hash32(x: Tensor) -> Tensor:
    """The integer hash "lowbias32" (Chris Wellons, hash-prospector, public domain)."""
    mask = 0xFFFFFFFF
    x = x.long() & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x ^ (x >> shift)
        # 32 x 32 bits overflow 64; the low 32 bits that wrap around are still right.
        x = (x * factor) & mask
    return x ^ (x >> 16)


def full_cache(model: Model) -> Model:
    """A copy that evicts nothing."""
    peer = copy.deepcopy(model)
    for gate in gates(peer):
        gate.enabled = False
    return peer


def sliding_window(model: Model, resident_budget: float, sinks: int = SINKS) -> Model:
    """A copy whose KV heads hold `resident_budget` tokens, the first `sinks` and the newest; its gates are not used."""
    window = round(resident_budget) - sinks - 1
    if window < 1:
        raise ValueError(
            f"resident_budget={resident_budget:g} must be at least sinks + 2 = {sinks + 2}"
        )
    return _with_gates(model, lambda gate: SlidingWindowGate(gate, window, sinks))


def random_eviction(model: Model, evicted_fraction: float, seed: int = 0) -> Model:
    """A copy that marks a random share of tokens, with the model's own delay window; see `fraction_for_budget`."""
    if not 0 <= evicted_fraction <= 1:
        raise ValueError(f"evicted_fraction={evicted_fraction:g} must be between 0 and 1")
    return _with_gates(model, lambda gate: RandomGate(gate, evicted_fraction, seed))


def _with_gates(model: Model, make: Callable[[EvictionGate], EvictionGate]) -> Model:
    peer = copy.deepcopy(model)
    modules: Iterable[Any] = dms_modules(peer).values()
    for module in modules:
        module.dms_gate = make(module.dms_gate)
    return peer


def fraction_for_budget(resident_budget: float, context_tokens: float, window: int) -> float:
    """Share of tokens to mark so that `resident_budget` live; the newest window + 1 always do."""
    old = context_tokens - window - 1
    if old <= 0:
        return 0.0
    return min(1.0, max(0.0, 1 - (resident_budget - window - 1) / old))


# From keys [B, K, T, D] and a number to the tokens that stay [B, K, kept].
Choose = Callable[[Tensor, int], Tensor]


class CutLayer(DynamicLayer):
    """What is left of a layer after an eviction; later tokens get the positions that they would have had without it."""

    def __init__(self, keys: Tensor, values: Tensor, evicted: int) -> None:
        """Take over the rows [B, K, kept, D] that stay; every head has lost `evicted` tokens, of its own choice."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.evicted = keys, values, evicted

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included: the next token's position."""
        return int(self.evicted + self.keys.shape[-2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows, and where they begin: as if the newest were held, so that all of them are in front of every query."""
        return self.keys.shape[-2] + query_length, self.evicted


def cut(cache: Cache, choose: Choose, kept: int) -> DynamicCache:
    """A copy of a plain model's cache in which every KV head holds exactly `kept` of the tokens seen.

    Args:
        cache: a DynamicCache after a context; not changed.
        choose: `keydiff` or `sinks_and_recent`.
        kept: tokens a head.
    """
    seen = cache.get_seq_length()
    if not SINKS < kept <= seen:
        raise ValueError(f"kept={kept} must be above {SINKS} and at most the {seen} tokens seen")
    left = DynamicCache()
    layers: Iterable[Any] = cache.layers
    for layer in layers:
        index = choose(layer.keys, kept).sort(-1).values[..., None]  # [B, K, kept, 1]
        keys, values = (
            x.gather(2, index.expand(-1, -1, -1, x.shape[-1])) for x in (layer.keys, layer.values)
        )
        left.layers.append(CutLayer(keys, values, seen - kept))
    return left


def keydiff(keys: Tensor, kept: int) -> Tensor:
    """The tokens whose keys are least like the mean direction of all of them (KeyDiff, arXiv 2504.15364).

    Of all keys at once, as in kvpress; the paper's own prefill goes block by block.

    Args:
        keys: as they are cached, rotated [B, K, T, D].
        kept: tokens a head.

    Returns:
        Indices [B, K, kept].
    """
    keys = keys.double()  # in bfloat16, many scores would be the same
    mean = F.normalize(keys, dim=-1).mean(2, keepdim=True)  # [B, K, T, D] -> [B, K, 1, D]
    return F.cosine_similarity(keys, mean, dim=-1).topk(kept, largest=False).indices


def sinks_and_recent(keys: Tensor, kept: int) -> Tensor:
    """The first `SINKS` and the newest tokens (StreamingLLM, arXiv 2309.17453): indices [B, K, kept]."""
    B, K, T, _ = keys.shape
    first = torch.arange(SINKS, device=keys.device)
    newest = torch.arange(T - kept + SINKS, T, device=keys.device)
    return torch.cat([first, newest]).expand(B, K, -1)
