# SPDX-License-Identifier: Apache-2.0
"""What the KV cache of a sequence held, whether it forgets or not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache

from modelopt_dms.evaluation.peers import CutLayer
from modelopt_dms.kvcache.hf_cache import DMSLayer, kv_stats


@dataclass(frozen=True)
class Footprint:
    """What the KV cache of one sequence held, on average over sequences.

    Attributes:
        context_tokens: tokens seen.
        resident_tokens: tokens held by a KV head, mean over layers and heads.
        kv_bytes: bytes allocated for keys and values, with the room that lists have to grow.
        dense_bytes: bytes of all tokens seen, in the same format, without eviction.
        compression_ratio: context over resident tokens, over layers and heads by bytes.
    """

    context_tokens: float
    resident_tokens: float
    kv_bytes: float
    dense_bytes: float
    compression_ratio: float


def footprint(cache: Cache) -> Footprint:
    """What one sequence of a cache holds on average; a plain model's cache holds everything, unless it was `cut`."""
    if any(isinstance(layer, DMSLayer) for layer in cache.layers):
        stats = kv_stats(cache)
        sequences = len(stats.layers[0].context)
        return Footprint(
            stats.context_tokens,
            stats.resident_tokens,
            stats.kv_bytes / sequences,
            stats.dense_bytes / sequences,
            stats.compression_ratio,
        )
    layers: Sequence[Any] = cache.layers
    tensors = [x for layer in layers for x in (layer.keys, layer.values)]
    kv_bytes = sum(x.numel() * x.element_size() for x in tensors) / len(tensors[0])
    seen = cache.get_seq_length()
    live = seen - max((x.evicted for x in layers if isinstance(x, CutLayer)), default=0)
    return Footprint(seen, live, kv_bytes, kv_bytes * seen / live, seen / live)


def mean_footprint(parts: Sequence[tuple[int, Footprint]]) -> Footprint:
    """Mean over batches by their number of sequences; compression ratios as ratios of bytes."""
    total = sum(count for count, _ in parts)

    def mean(value: Callable[[Footprint], float]) -> float:
        return sum(count * value(part) for count, part in parts) / total

    return Footprint(
        mean(lambda x: x.context_tokens),
        mean(lambda x: x.resident_tokens),
        mean(lambda x: x.kv_bytes),
        mean(lambda x: x.dense_bytes),
        1.0 / mean(lambda x: 1.0 / x.compression_ratio),
    )
