# SPDX-License-Identifier: Apache-2.0
"""The two ops of a served graph: attention with decisions as an input, and the same on a cache that forgets.

`gated_attention` is what a DMS model's layer becomes when its graph is taken; `cached_gated_attention` is what a
serving engine puts in its place, with its metadata and the layer's tensors (`state`). Importing this registers them
with PyTorch, and imports neither Triton nor TensorRT-LLM.

Shapes: B sequences, T tokens, H query heads, K KV heads; of a cached step, [B, T] is [1, all tokens] or [B, 1].
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from modelopt_dms.exporters.trtllm.state import KNOB, LISTS, STATE, Formats, formats, together
from modelopt_dms.kernels import dispatch, reorder
from modelopt_dms.kernels.gating import Decided
from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables
from modelopt_dms.kernels.prefill_reference import Chunk, expiry
from modelopt_dms.kernels.reference import Prompt, Scoring, shift_decisions
from modelopt_dms.kernels.rollback import decide_previous
from modelopt_dms.modeling.paged_attention import CHUNK

NAMESPACE = "modelopt_dms"
# Arguments that both ops share, in their order.
TENSORS = ("query", "key", "value", "evict")
# By a pool's counters: what they were after the last step of single tokens, and when that arrives at the host.
_COUNTERS = WeakTensorKeyDictionary()
# What the cached op wants to know about a batch, by AutoDeploy's names.
METADATA = ("batch_info_host", "cu_seqlen_host", "input_pos_host", "slot_idx_host")
# Numbers that go from the node of the one op to the node of the other.
CONSTANTS = ("scale", "window", "shift", "key_amax", "value_amax")


def _schema(tensors: tuple[str, ...], changed: tuple[str, ...], rest: str) -> str:
    read = [f"Tensor {name}" for name in tensors]
    written = [f"Tensor(a{i}!) {name}" for i, name in enumerate(changed)]
    return f"({', '.join([*read, *written, rest])}) -> Tensor"


_NUMBERS = "float scale, int window, int shift, float? key_amax, float? value_amax"


def _gated_attention(
    query: Tensor, key: Tensor, value: Tensor, evict: Tensor, **given: Any
) -> Tensor:
    """Attention of whole sequences under the delayed-eviction mask.

    Args:
        query: [B, T, H, D].
        key: [B, T, K, D].
        value: [B, T, K, Dv].
        evict: decisions [B, T, K] bool, as made by these tokens' hidden states.
        **given: numbers of the schema.

    Returns:
        Output [B, T, H, Dv].
    """
    q, k, v, evict = (x.transpose(1, 2) for x in (query, key, value, evict))
    k, v = _through(formats(given["key_amax"], given["value_amax"]), k, v)
    governed = shift_decisions(evict, given["shift"])
    keep = torch.zeros(governed.shape, device=q.device).masked_fill(governed, float("-inf"))
    scoring = Scoring(given["scale"])
    out = dispatch.prefill_attention(Prompt(q, k, v, keep, given["window"]), scoring)
    return out.transpose(1, 2).contiguous()


def _cached_gated_attention(
    query: Tensor, key: Tensor, value: Tensor, evict: Tensor, **given: Any
) -> Tensor:
    """Attention of new tokens of many sequences over what lives of them, after which they are taken in.

    First come prompts, or parts of them, of any length; then single tokens. A sequence whose first token is at
    position 0 takes its slot over from whoever had it.

    Args:
        query: [B, T, H, D].
        key: [B, T, K, D].
        value: [B, T, K, Dv].
        evict: decisions [B, T, K] bool.
        **given: metadata, state and numbers of the schema.

    Returns:
        Output [B, T, H, Dv].

    Raises:
        ValueError: metadata that this cache cannot follow.
        OutOfPagesError: the pages are used up.
    """
    pool, lists = together(given, key, value)
    q, k, v, decisions = (x.flatten(0, 1) for x in (query, key, value, evict))
    prompts, prompt_tokens, drafts, _, singles, _ = given["batch_info_host"][:6].tolist()
    if drafts:
        raise ValueError(
            f"{drafts} sequences bring drafted tokens: a DMS cache in TensorRT-LLM cannot take tokens back, so "
            "speculative_config must be unset"
        )
    bounds = given["cu_seqlen_host"].tolist()
    starts, slots = (given[name].tolist() for name in ("input_pos_host", "slot_idx_host"))
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    scoring = Scoring(given["scale"])
    for i in range(prompts):
        part = slice(bounds[i], bounds[i + 1])
        own = _sequence(lists, slots[i])
        _start(pool, own, starts[i], slots[i])
        rows = (q[part], k[part], v[part], decisions[part])
        out[part] = _prompt(*rows, starts[i], pool, own, scoring)
    if singles:
        part = slice(prompt_tokens, prompt_tokens + singles)
        chosen = torch.tensor(slots[prompts : prompts + singles])
        chosen = chosen.to(q.device, non_blocking=True)
        out[part] = _single(
            q[part], k[part], v[part], decisions[part], pool, lists, chosen, scoring
        )
    if prompts:
        pool.check(KNOB)
    else:
        _check_without_waiting(pool)
    return out.view(*query.shape[:3], v.shape[-1])


def _check_without_waiting(pool: PagePool) -> None:
    """As `pool.check` of what the step before left, and ask what this one leaves."""
    before = _COUNTERS.get(pool.counters)
    if before is not None and (before[1] is None or before[1].query()):
        replace(pool, counters=before[0]).check(KNOB)
    on_gpu = pool.counters.is_cuda
    found = torch.empty(2, dtype=torch.int32, pin_memory=on_gpu)
    found.copy_(pool.counters, non_blocking=True)
    arrived = torch.cuda.current_stream().record_event() if on_gpu else None
    _COUNTERS[pool.counters] = (found, arrived)


def _sequence(lists: PageTables, slot: int) -> PageTables:
    """The lists of one sequence slot; they change in place."""
    own = {name: getattr(lists, name)[slot : slot + 1] for name in (*LISTS, "active")}
    return replace(lists, **own)


def _start(pool: PagePool, own: PageTables, position: int, slot: int) -> None:
    """Give back what the sequence before had in this slot, or see to it that this one goes on where it stopped."""
    if position == 0:
        reorder.drop(own, pool, own.active)
        return
    seen = int(own.seen[0, 0])
    if seen != position:
        raise ValueError(
            f"a prompt goes on at position {position} in slot {slot}, whose cache has seen {seen} tokens: reuse of KV "
            "blocks is not possible with DMS, set kv_cache_config.enable_block_reuse to false"
        )


def _prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    position: int,
    pool: PagePool,
    own: PageTables,
    scoring: Scoring,
) -> Tensor:
    """Output [T, H, Dv] of tokens from a position on: q [T, H, D], k [T, K, D], v [T, K, Dv], evict [T, K]."""
    q, k, v, evict = (x.transpose(0, 1)[None] for x in (q, k, v, evict))  # -> [1, heads, T, .]
    read_k, read_v = _through(own.formats, k, v)
    outs = []
    for start in range(0, q.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        decisions = evict[..., part].contiguous()
        decide_previous(own, decisions[..., 0])
        new_q, new_k, new_v = (x[:, :, part].contiguous() for x in (q, read_k, read_v))
        governed = shift_decisions(decisions, own.shift)
        first = own.seen[:, 0].contiguous()
        seen = min(position + start, own.table.shape[2] * PAGE)
        ends = expiry(own, seen) if seen else None
        chunk = Chunk(new_q, new_k, new_v, governed, first, expiry=ends)
        outs.append(dispatch.attend_chunk(chunk, pool, own, scoring))
        raw_k, raw_v = (x[:, :, part].contiguous() for x in (k, v))
        dispatch.pack(raw_k, raw_v, decisions, None, pool, own)
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def _single(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    pool: PagePool,
    lists: PageTables,
    chosen: Tensor,
    scoring: Scoring,
) -> Tensor:
    """Output [n, H, Dv] of one token q [n, H, D], k [n, K, D], v [n, K, Dv], evict [n, K] of each chosen slot [n]."""
    names = (*LISTS, "active")
    some = replace(lists, **{name: getattr(lists, name)[chosen] for name in names})
    dispatch.append_token(k, v, Decided(evict), pool, some)
    out = dispatch.decode_attention(q, pool, some, scoring)
    for name in LISTS:
        getattr(lists, name)[chosen] = getattr(some, name)
    return out


def _through(forms: Formats, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, K, T, .] as they will be read from the cache."""
    read = [
        x if form is None else form.decode(form.encode(x), x.shape[-1], x.dtype)
        for form, x in zip(forms, (k, v), strict=True)
    ]
    return read[0], read[1]


def _like_queries(query: Tensor, key: Tensor, value: Tensor, *args: Any, **given: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _define(name: str, schema: str, function: Any, names: tuple[str, ...]) -> None:
    """Register an op whose arguments after the first four reach `function` by name."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, evict: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        given = dict.fromkeys(names[len(TENSORS) :])
        given |= dict(zip(names[len(TENSORS) :], args, strict=False)) | kwargs
        with torch.cuda.device_of(query):
            return function(query, key, value, evict, **given)

    torch.library.define(f"{NAMESPACE}::{name}", schema)
    torch.library.impl(f"{NAMESPACE}::{name}", "CompositeExplicitAutograd")(run)
    torch.library.register_fake(f"{NAMESPACE}::{name}")(_like_queries)


# AutoDeploy asks the nodes that it replaces for sliding_window; a DMS layer has none.
_SOURCE = f"{_NUMBERS}, float pool_ratio=1.0, int? sliding_window=None"
_define(
    "gated_attention",
    _schema(TENSORS, (), _SOURCE),
    _gated_attention,
    (*TENSORS, *CONSTANTS, "pool_ratio", "sliding_window"),
)
_define(
    "cached_gated_attention",
    _schema(TENSORS + METADATA, STATE, _NUMBERS),
    _cached_gated_attention,
    (*TENSORS, *METADATA, *STATE, *CONSTANTS),
)

SOURCE = torch.ops.modelopt_dms.gated_attention
CACHED = torch.ops.modelopt_dms.cached_gated_attention
