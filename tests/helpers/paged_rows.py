# SPDX-License-Identifier: Apache-2.0
"""Paged lists with random rows, and what attention over them gives in float64."""

import torch
from torch import Tensor

from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.number_formats import Fp8, Int8, Nvfp4, RowFormat
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.kernels.rows import write_rows

AMAX = 4.0


FORMATS = {
    "plain": lambda heads: None,
    "fp8": lambda heads: Fp8(torch.linspace(AMAX, 2 * AMAX, heads)),
    "fp8_row": lambda heads: Fp8(None),
    "int8": lambda heads: Int8(torch.linspace(AMAX, 2 * AMAX, heads)),
    "int8_row": lambda heads: Int8(None),
    "nvfp4": lambda heads: Nvfp4(torch.linspace(AMAX, 2 * AMAX, heads)),
}


class Cache:
    """Paged lists of given lengths [B][K] with random rows, and the rows as they are stored, in float64."""

    def __init__(
        self,
        live: list[list[int]],
        dims: tuple[int, int],
        formats: tuple[str, str] = ("plain", "plain"),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        pages_seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        lengths = torch.tensor(live, dtype=torch.int32)
        B, K = lengths.shape
        most = int(lengths.max())
        P = max(1, -(-most // PAGE))
        k_format, v_format = (FORMATS[name](K) for name in formats)
        self.lists = PageTables.make(
            B, K, P, 4, 0, torch.ones(B, dtype=torch.bool), (k_format, v_format)
        )
        layouts = [
            RowLayout.of(form, dim, dtype)
            for form, dim in zip((k_format, v_format), dims, strict=True)
        ]
        needed = -(-lengths // PAGE)
        self.pool = PagePool.make(int(needed.sum()) + 5, *layouts, torch.device("cpu"))
        _fill_with_garbage(self.pool)
        generator = torch.Generator().manual_seed(pages_seed)
        ids = (torch.randperm(self.pool.pages, generator=generator) + 1).int()
        owned = torch.arange(P) < needed[..., None]
        self.lists.table[owned] = ids[: int(owned.sum())]
        self.lists.live.copy_(lengths)
        k, v = (
            torch.randn(B, K, most, dims[0]).to(dtype),
            torch.randn(B, K, most, dims[1]).to(dtype),
        )
        slots = torch.arange(most).expand(B, K, most)
        slots = torch.where(slots < lengths[..., None], slots, -1)
        write_rows(self.pool, self.lists, slots, k, v)
        _fill_with_garbage(self.pool, page=0)
        self.keys, self.values = _stored(k_format, k), _stored(v_format, v)


def _fill_with_garbage(pool: PagePool, page: int | slice = slice(None)) -> None:
    for x in (pool.keys, pool.values, pool.key_scales, pool.value_scales):
        if x is not None:
            x[page] = 0x7F if x.dtype == torch.uint8 else float("nan")


def _stored(form: RowFormat | None, x: Tensor) -> Tensor:
    if form is None:
        return x.double()
    return form.decode(form.encode(x), x.shape[-1], torch.float64)


def expected_output(q: Tensor, k: Tensor, v: Tensor, live: Tensor, scoring: Scoring) -> Tensor:
    """Head by head and key by key, in float64: [B, H, Dv]."""
    B, H, _ = q.shape
    G = H // k.shape[1]
    out = torch.zeros(B, H, v.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            n = int(live[b, h // G])
            if n == 0:
                continue
            scores = k[b, h // G, :n] @ q[b, h].double() * scoring.scale
            if scoring.softcap is not None:
                scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
            if scoring.sinks is not None:
                scores = torch.cat([scores, scoring.sinks[h : h + 1].double()])
            out[b, h] = scores.softmax(-1)[:n] @ v[b, h // G, :n]
    return out
