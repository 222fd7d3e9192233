# SPDX-License-Identifier: Apache-2.0
"""What `graphed` reserves for a long chain of thought after a short prompt, beside what a dense cache takes."""

import pytest
import torch

from modelopt_dms.kernels.layout import PAGE, RowLayout
from modelopt_dms.kvcache.reserve import pages_per_list

WINDOW, NEW = 256, 32768
# Layers and KV heads; all have rows of 128 numbers in bfloat16.
MODELS = {"Qwen3-8B": (36, 8), "Llama-3.1-8B": (32, 8), "Qwen3-32B": (64, 8)}
# Pages of a list at compression ratios 2, 4, 8, by the prompt's length.
PAGES = {10: (300, 153, 79), 100: (301, 153, 79), 2000: (318, 162, 84)}


def bytes_per_token(name: str) -> int:
    layers, heads = MODELS[name]
    return 2 * layers * heads * RowLayout("plain", 128, torch.bfloat16).row_bytes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", PAGES)
def test_a_long_answer_reserves_its_share_of_a_dense_cache(name: str, prompt: int) -> None:
    row, T = bytes_per_token(name), prompt + NEW
    for cr, pinned in zip((2, 4, 8), PAGES[prompt], strict=True):
        pages = pages_per_list(T, 1 - 1 / cr, WINDOW)
        assert pages == pinned
        # A page that is not full, and one to share.
        assert pages * PAGE * row <= 1.15 * T * row / cr + (WINDOW + 1 + 2 * PAGE) * row


@pytest.mark.parametrize("T", [1, 63, 64, 65, 300, 32768])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.875, 1.0])
def test_nothing_reserves_more_than_a_dense_cache_and_a_page(T: int, share: float) -> None:
    assert pages_per_list(T, share, WINDOW, 4) * PAGE < T + PAGE


def test_gigabytes_of_one_sequence() -> None:
    """What stands in the documentation: dense and reserved at CR 8, for ten tokens and an answer of 32K."""
    found = {
        name: tuple(
            round(x * bytes_per_token(name) / 1e9, 2)
            for x in (10 + NEW, PAGE * pages_per_list(10 + NEW, 7 / 8, WINDOW))
        )
        for name in MODELS
    }
    assert found == {
        "Qwen3-8B": (4.83, 0.75),
        "Llama-3.1-8B": (4.3, 0.66),
        "Qwen3-32B": (8.59, 1.33),
    }
