# SPDX-License-Identifier: Apache-2.0
"""One layer's KV cache as nine tensors that a serving engine owns: pages, and the lists of its sequence slots.

Shapes: N pages, S sequence slots, K KV heads, P pages a list can own, R ring.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.number_formats import Fp8, RowFormat

POOL = ("keys", "values", "free", "counters")
LISTS = ("table", "live", "seen", "ring_slot", "ring_evict")
STATE = POOL + LISTS
KNOB = "lower dms_pool_ratio, max_batch_size or max_seq_len"


@dataclass(frozen=True)
class Layer:
    """What a layer's tensors must be made for.

    Attributes:
        heads: K.
        key_dim: D.
        value_dim: Dv.
        dtype: of the model's keys and values.
        window: tokens a marked token stays readable.
        shift: 1 if a token's decision governs the token before it.
        pool_ratio: how many times fewer rows the pages have than max_batch_size sequences of max_seq_len tokens.
        key_amax: calibrated range of FP8 keys; None keeps them in the model's dtype.
        value_amax: likewise.
    """

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int
    shift: int
    pool_ratio: float
    key_amax: float | None
    value_amax: float | None

    def pages(self, slots: int, max_seq_len: int) -> int:
        """Pages of the pool: the window and a page more for every list, and a share of what no list would evict."""
        most = -(-max_seq_len // PAGE)
        least = min(most, -(-self.window // PAGE) + 1)
        share = -(-slots * most // self.pool_ratio)
        return self.heads * max(slots * least, min(slots * most, int(share)))

    def tensor(self, name: str, slots: int, max_seq_len: int, device: torch.device) -> Tensor:
        """The tensor of this name, empty, for so many sequence slots."""
        pages, most = self.pages(slots, max_seq_len), -(-max_seq_len // PAGE)
        if name in POOL:
            # Only what is asked for gets memory: the other one of keys and values is made of rows without numbers.
            dims = (self.key_dim * (name == "keys"), self.value_dim * (name == "values"))
            forms = formats(self.key_amax, self.value_amax)
            keys, values = (
                RowLayout.of(form, dim, self.dtype) for form, dim in zip(forms, dims, strict=True)
            )
            return getattr(PagePool.make(pages, keys, values, device), name)
        active = torch.ones(slots, dtype=torch.bool, device=device)
        lists = PageTables.make(slots, self.heads, most, self.window, self.shift, active)
        return getattr(lists, name)


Formats = tuple[RowFormat | None, RowFormat | None]


@lru_cache
def formats(key_amax: float | None, value_amax: float | None) -> Formats:
    """Number formats of keys and values from calibrated FP8 ranges; None is the model's own dtype."""
    made = [None if x is None else Fp8(torch.tensor([x])) for x in (key_amax, value_amax)]
    return made[0], made[1]


@lru_cache
def _scales(
    key_amax: float | None, value_amax: float | None, heads: int, device: torch.device
) -> Tensor:
    """Factors [4, K] of encoding and decoding; see `PageTables`."""
    active = torch.ones(1, dtype=torch.bool, device=device)
    return PageTables.make(1, heads, 1, 1, 0, active, formats(key_amax, value_amax)).scales


def together(given: dict[str, Any], key: Tensor, value: Tensor) -> tuple[PagePool, PageTables]:
    """A layer's tensors as a pool and the lists of all slots.

    Args:
        given: tensors and numbers by name.
        key: rows [.., K, D] of this layer.
        value: rows [.., K, Dv].
    """
    ranges = (given["key_amax"], given["value_amax"])
    forms = formats(*ranges)
    keys, values = (
        RowLayout.of(form, x.shape[-1], x.dtype)
        for form, x in zip(forms, (key, value), strict=True)
    )
    # Calibrated formats store no scales with their rows.
    pool = PagePool(
        keys,
        values,
        given["keys"],
        given["values"],
        key_scales=None,
        value_scales=None,
        free=given["free"],
        counters=given["counters"],
    )
    lists = PageTables(
        given["window"],
        given["shift"],
        **{name: given[name] for name in LISTS},
        active=torch.ones(len(given["live"]), dtype=torch.bool, device=key.device),
        formats=forms,
        scales=_scales(*ranges, key.shape[-2], key.device),
    )
    return pool, lists
