# SPDX-License-Identifier: Apache-2.0
"""Caches at a long context without a prefill: random rows, of which gates that decide at random evict a share."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from modelopt_dms.config.compression_ratio import target_evicted_fraction
from modelopt_dms.gates.gate import hidden_input
from modelopt_dms.modeling.convert import dms_modules

# Rows of one layer that exist outside the cache at a time, keys and values together.
CHUNK_BYTES = 1 << 30
SAMPLE = (4, 512)  # sequences and tokens from which thresholds are set


@torch.no_grad()
def force_ratio(model: PreTrainedModel, cr: float, length: int) -> float:
    """Random gate weights, and thresholds that the share of random tokens exceeds which gives this ratio.

    Args:
        model: a converted model.
        cr: compression ratio after `length` tokens; 1 evicts nothing.
        length: tokens of a sequence.

    Returns:
        The share of tokens that is marked.
    """
    modules = list(dms_modules(model).values())
    gate = modules[0].dms_gate
    share = target_evicted_fraction(cr, length, gate.window, gate.protect_first)
    hidden: dict[Any, Tensor] = {}

    def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden[module] = hidden_input(args, kwargs)

    hooks = [x.register_forward_pre_hook(remember, with_kwargs=True) for x in modules]
    ids = torch.randint(model.config.vocab_size, SAMPLE, device=model.device)
    for module in modules:
        module.dms_gate.threshold.fill_(torch.inf)
    model(ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    for module in modules:
        gate = module.dms_gate
        torch.nn.init.normal_(gate.weight, std=gate.weight.shape[1] ** -0.5)
        logits = gate.logits(hidden.pop(module)).transpose(0, 1).flatten(1)  # [K, B * T]
        gate.threshold.copy_(logits.quantile(1 - share, dim=1) if share else torch.inf)
    return share


@torch.no_grad()
def fill_dms(cache: Any, model: PreTrainedModel, batch: int, tokens: int, share: float) -> None:
    """Let every layer of a `DMSCache` take in random rows, a random share of them marked, in chunks.

    Args:
        cache: empty.
        model: whose cache it is.
        batch: sequences.
        tokens: of each.
        share: of tokens that are marked.
    """
    config = model.config
    row = 2 * batch * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    sizes = list(_pieces(tokens, max(1, CHUNK_BYTES // row)))
    shape = (batch, config.num_key_value_heads, sizes[0], config.head_dim)
    k, v = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    for layer in cache.layers:
        for size in sizes:
            evict = torch.rand(*shape[:2], size, device=model.device) < share
            layer.expected = True
            layer.update(k[:, :, :size], v[:, :, :size])
            layer.append(layer.take_incoming(), evict, None)


@torch.no_grad()
def fill_static(cache: StaticCache, model: PreTrainedModel, batch: int, tokens: int) -> None:
    """Random rows for the first `tokens` positions of every layer of a static cache."""
    config = model.config
    shape = (batch, config.num_key_value_heads, 0, config.head_dim)
    nothing = torch.empty(shape, dtype=model.dtype, device=model.device)
    for layer in cache.layers:
        layer.lazy_initialization(nothing, nothing)
        for rows in (layer.keys, layer.values):
            rows[:, :, :tokens].normal_()
        layer.cumulative_length.fill_(tokens)


def _pieces(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)
