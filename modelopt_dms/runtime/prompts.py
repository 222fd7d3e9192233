# SPDX-License-Identifier: Apache-2.0
"""Prompts of a static batch: whether the graphs can take them, and the pages of their lists.

Shapes: B batch slots, K KV heads, P pages a list can own.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modelopt_dms.kernels.layout import NO_PAGE, OutOfPagesError
from modelopt_dms.runtime.manifest import EngineError, Manifest


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch: int, manifest: Manifest
) -> list[list[int]]:
    """Prompts that the graphs can take.

    Raises:
        EngineError: more than batch slots; or one is not integers, none at all, not of the vocabulary, or too long.
    """
    if max_new_tokens < 1:
        raise EngineError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    if not 0 < len(prompts) <= batch:
        raise EngineError(
            f"{len(prompts)} prompts for {batch} batch slots; expected 1 .. {batch}; open the session (onnxruntime) "
            "or build the engine with a larger batch (--batch)"
        )
    return [_check_prompt(x, max_new_tokens, manifest) for x in prompts]


def _check_prompt(ids: Sequence[int], max_new_tokens: int, manifest: Manifest) -> list[int]:
    found: NDArray[np.generic]
    try:
        found = np.asarray(ids)
    except ValueError as error:
        raise EngineError(
            f"a prompt must be a list of integers, got lists of several lengths ({error})"
        ) from error
    if found.size == 0:
        raise EngineError("a prompt is empty; an engine needs one token at least")
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise EngineError(
            f"a prompt must be a list of integers, got {found.dtype} {list(found.shape)}"
        )
    model = manifest.model
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= model.vocabulary:
        raise EngineError(
            f"ids of a prompt must be 0 .. {model.vocabulary - 1}, got {low if low < 0 else high}"
        )
    if len(found) + max_new_tokens > manifest.max_length:
        raise EngineError(
            f"too long a prompt for the profile: {len(found)} tokens and {max_new_tokens} new ones, and the graphs "
            f"were exported for {manifest.max_length}; shorten it, or export with a larger --max-length"
        )
    return found.tolist()


def allocate_pages(
    lengths: Sequence[int], batch: int, pages: int, manifest: Manifest
) -> NDArray[np.int32]:
    """Page tables [B, K, P] of a layer, in which every list has room for all tokens of its row, evicted or not.

    Args:
        lengths: tokens of each row that the cache takes in; the batch slots behind them stay empty.
        batch: B.
        pages: of a layer that can be given out; their ids begin at 1.
        manifest: of the graphs.

    Raises:
        OutOfPagesError: these are too few.
    """
    model, size = manifest.model, manifest.page
    counts = [-(-x // size) for x in lengths]
    needed = sum(counts) * model.kv_heads
    if needed > pages:
        held, asked = (x * model.layers * model.page_bytes for x in (pages, needed))
        raise OutOfPagesError(
            f"out of pages: the KV cache has {pages} pages of {size} slots in each of {model.layers} layers ({held} "
            f"bytes), and {len(lengths)} prompts with their new tokens need {needed} ({asked} bytes); give it "
            f"--pages {needed}, fewer prompts, or fewer new tokens"
        )
    table = np.full((batch, model.kv_heads, manifest.pages_per_list), NO_PAGE, np.int32)
    first = 1
    for row, count in enumerate(counts):
        for head in range(model.kv_heads):
            table[row, head, :count] = range(first, first + count)
            first += count
    return table
