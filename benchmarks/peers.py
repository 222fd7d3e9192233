# SPDX-License-Identifier: Apache-2.0
"""Attention of others on the same resident tokens: PyTorch's SDPA and flex, and FlashInfer, XQA, FA3 where importable.

Each maker takes `Paged` (plain rows) and gives a function of the layer's index whose output is [B, H, D]. The last
three see every list as a sequence with one KV head, and read our pages as they lie. None of them is needed.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from cases import Paged
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from modelopt_dms.kernels.layout import PAGE

Layer = Callable[[int], Tensor]
WORKSPACE = 256 << 20


def sdpa(case: Paged) -> Layer:
    """scaled_dot_product_attention with enable_gqa over padded keys; a mask only where lengths differ."""
    held = [_padded(case, i) for i in range(len(case.layers))]
    group = case.heads.group

    def run(i: int) -> Tensor:
        k, v, seen = held[i]
        mask = None if seen is None else seen.repeat_interleave(group, 1)[:, :, None]
        query = case.q[i][:, :, None]
        return F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]

    return run


def sdpa_packed(case: Paged) -> Layer:
    """The same, with the G query heads of a group as rows of one query: keys are read once."""
    held = [_padded(case, i) for i in range(len(case.layers))]
    kv = case.heads.kv

    def run(i: int) -> Tensor:
        k, v, seen = held[i]
        mask = None if seen is None else seen[:, :, None]
        query = case.q[i].unflatten(1, (kv, -1))
        return F.scaled_dot_product_attention(query, k, v, attn_mask=mask).flatten(1, 2)

    return run


def flex(case: Paged) -> Layer:
    """flex_attention with a block mask of the lengths, compiled on a GPU."""
    attend: Any = flex_attention
    if case.device.type == "cuda":
        attend = torch.compile(flex_attention, dynamic=False)
    group = case.heads.group
    held = []
    for i, lists in enumerate(case.layers):
        k, v, _ = _padded(case, i)

        def seen(b: Any, h: Any, q: Any, kv: Any, live: Tensor = lists.live) -> Any:
            return kv < live[b, h // group]

        B, H = case.q[i].shape[:2]
        held.append((k, v, create_block_mask(seen, B, H, 1, k.shape[2], device=str(case.device))))

    def run(i: int) -> Tensor:
        k, v, mask = held[i]
        out: Tensor = attend(case.q[i][:, :, None], k, v, block_mask=mask, enable_gqa=True)
        return out[:, :, 0]

    return run


def flashinfer(case: Paged) -> Layer:
    """FlashInfer's paged decode; planned (which asks the host) once, before the time."""
    module = import_module("flashinfer")
    wrappers = []
    for lists in case.layers:
        live = lists.live.flatten()
        pages = -(-live // PAGE)
        indptr = F.pad(pages.cumsum(0), (1, 0)).int()
        width = lists.table.shape[2]
        owned = torch.arange(width, device=case.device) < pages[:, None]
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(WORKSPACE, dtype=torch.uint8, device=case.device),
            "NHD",
            use_tensor_cores=True,
        )
        wrapper.plan(
            indptr,
            lists.table.view(-1, width)[owned],
            (live - 1) % PAGE + 1,
            case.heads.group,
            1,
            case.heads.dim,
            PAGE,
            q_data_type=case.q[0].dtype,
            kv_data_type=case.pool.keys.dtype,
        )
        wrappers.append(wrapper)
    cache = _one_head(case)

    def run(i: int) -> Tensor:
        out: Tensor = wrappers[i].run(_one_list_each(case, i), cache)
        return out.view_as(case.q[i])

    return run


def xqa(case: Paged) -> Layer:
    """TensorRT-LLM's XQA kernel, as FlashInfer ships it."""
    call = import_module("flashinfer.decode").xqa_batch_decode_with_kv_cache
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=case.device)
    cache = _one_head(case)
    longest = [int(lists.live.max()) for lists in case.layers]

    def run(i: int) -> Tensor:
        lists = case.layers[i]
        out: Tensor = call(
            _one_list_each(case, i),
            cache,
            workspace,
            lists.table.flatten(0, 1),
            lists.live.flatten().to(torch.uint32),
            longest[i],
            bmm1_scale=case.heads.scoring.scale,
        )
        return out.view_as(case.q[i])

    return run


def fa3(case: Paged) -> Layer:
    """FlashAttention 3 for Hopper, paged, GQA packed."""
    call = import_module("flash_attn_interface").flash_attn_with_kvcache
    keys, values = _one_head(case)

    def run(i: int) -> Tensor:
        lists = case.layers[i]
        out: Tensor = call(
            _one_list_each(case, i)[:, None],
            keys,
            values,
            cache_seqlens=lists.live.flatten(),
            page_table=lists.table.flatten(0, 1),
            causal=True,
            pack_gqa=True,
        )
        return out.view_as(case.q[i])

    return run


# name: what it needs, and its maker
DECODE: dict[str, tuple[str, Callable[[Paged], Layer]]] = {
    "sdpa": ("torch", sdpa),
    "sdpa, group as rows": ("torch", sdpa_packed),
    "flex": ("torch", flex),
    "flashinfer": ("flashinfer", flashinfer),
    "xqa": ("flashinfer", xqa),
    "fa3": ("flash_attn_interface", fa3),
}


@functools.cache
def absent() -> list[str]:
    """Those that cannot be imported here."""
    return [name for name, (package, _) in DECODE.items() if find_spec(package) is None]


def _padded(case: Paged, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [B, K, S, D], and which are live [B, K, S]; None if all are."""
    k, v = case.rows(layer, "keys"), case.rows(layer, "values")
    seen = torch.arange(k.shape[2], device=case.device) < case.layers[layer].live[..., None]
    return k, v, None if bool(seen.all()) else seen


def _one_head(case: Paged) -> tuple[Tensor, Tensor]:
    """The pages [N, PAGE, 1, D]."""
    return case.pool.keys[:, :, None], case.pool.values[:, :, None]


def _one_list_each(case: Paged, layer: int) -> Tensor:
    """Queries [B * K, G, D]."""
    return case.q[layer].unflatten(1, (case.heads.kv, -1)).flatten(0, 1)
