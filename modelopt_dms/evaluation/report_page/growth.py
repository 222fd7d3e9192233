# SPDX-License-Identifier: Apache-2.0
"""Resident tokens, bytes and time per token while a model reads a text and writes on, with and without eviction."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from modelopt_dms.evaluation.footprint import footprint
from modelopt_dms.kvcache.hf_cache import cache_argument, cache_of

READ = 64  # tokens of a chunk while the text is read
WARM = 2  # tokens whose time does not count: first calls set things up


@dataclass(frozen=True)
class Growth:
    """A cache over tokens seen; lists of one length.

    Attributes:
        seen: tokens seen.
        resident: tokens held by a head, mean.
        kv_bytes: bytes allocated.
        milliseconds: of the token that was written; None while the text is read.
        milliseconds_a_token: median of those written.
    """

    seen: list[int]
    resident: list[float]
    kv_bytes: list[float]
    milliseconds: list[float | None]
    milliseconds_a_token: float


@torch.no_grad()
def grow(
    model: Any, ids: list[int], new: int, script: list[int] | None, step: Callable[[], Any]
) -> tuple[Growth, list[int]]:
    """Read token ids [T], then write `new` tokens.

    Args:
        model: in eval mode.
        ids: the text.
        new: tokens to write.
        script: written in place of what the model says, so that two models do the same work; None: greedy.
        step: called after every chunk and token.

    Returns:
        What the cache held, and the tokens that were written.
    """
    cache: Any = None
    seen, resident, kv_bytes = [0], [0.0], [0.0]
    times: list[float | None] = [None]
    written: list[int] = []
    tokens = torch.tensor([ids], device=model.device)
    parts = [*tokens.split(READ, dim=1), *[None] * new]
    last = 0
    for part in parts:
        fed = part
        if fed is None:
            written.append(last if script is None else script[len(written)])
            fed = tokens.new_tensor([[written[-1]]])
        given = cache_argument(type(model).forward, cache)
        begin = time.perf_counter()
        out = model(input_ids=fed, use_cache=True, logits_to_keep=1, **given)
        last = int(out.logits[0, -1].argmax())  # waits for the device
        spent = 1000 * (time.perf_counter() - begin)
        cache = cache_of(out)
        held = footprint(cache)
        seen.append(round(held.context_tokens))
        resident.append(held.resident_tokens)
        kv_bytes.append(held.kv_bytes)
        times.append(spent if part is None else None)
        step()
    counted = [x for x in times if x is not None][WARM:]
    return Growth(seen, resident, kv_bytes, times, statistics.median(counted)), written


def compare_growth(
    model: PreTrainedModel, twin: PreTrainedModel, ids: list[int], new: int, step: Callable[[], Any]
) -> dict[str, Any]:
    """The same text and the same new tokens, those that the full cache writes, on both caches."""
    full, script = grow(twin, ids, new, None, step)
    dms, _ = grow(model, ids, new, script, step)
    return {"read": len(ids), "written": new, "full": asdict(full), "dms": asdict(dms)}
