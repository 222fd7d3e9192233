# SPDX-License-Identifier: Apache-2.0
"""The door to the paged ops: which implementation, decided once; the same arguments for both.

"triton" is the kernels, as `torch.library` ops: on CUDA, or anywhere under TRITON_INTERPRET=1. "reference" is what they
mean, in plain PyTorch. "auto" is triton on CUDA, and reference elsewhere.
"""

from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from modelopt_dms.ops import append_reference, decode_reference, prefill_reference, reference
from modelopt_dms.ops.gating import GateInput
from modelopt_dms.ops.paged import LayerLists, PagePool
from modelopt_dms.ops.reference import Scoring
from modelopt_dms.ops.undo import UndoLog


def choose(impl: str, device: torch.device) -> Literal["triton", "reference"]:
    """The implementation that `impl` means on this device.

    Raises:
        ValueError: an unknown name, or kernels that cannot run here.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl={impl!r} must be 'auto', 'triton' or 'reference'")
    if impl == "reference" or (impl == "auto" and device.type != "cuda"):
        return "reference"
    if torch.compiler.is_compiling():  # what cannot run was refused when the cache was made
        return "triton"
    if not _has_triton():
        raise ValueError(
            "impl='triton' needs Triton, which a CUDA build of PyTorch brings: pip install triton"
        )
    if device.type != "cuda" and not _interpreting():
        raise ValueError(
            f"impl='triton' needs a CUDA device, got {device.type!r}; accepted here: 'auto', 'reference', or "
            "TRITON_INTERPRET=1 in the environment (slow, for tests)"
        )
    return "triton"


def append_token(
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    pool: PagePool,
    lists: LayerLists,
    *,
    impl: str = "auto",
    log: UndoLog | None = None,
) -> None:
    """Decide about one token of every active sequence and take it in; see `append_reference.append_token`."""
    if choose(impl, k.device) == "reference":
        append_reference.append_token(k, v, gate, pool, lists, log)
        return
    from modelopt_dms.ops import append, library

    if log is None:
        library.append_token(k, v, gate, pool, lists)
        return
    with torch.cuda.device_of(k):
        append.append_token(k, v, gate, pool, lists, log)


def pack(
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    valid: Tensor | None,
    pool: PagePool,
    lists: LayerLists,
    *,
    impl: str = "auto",
) -> None:
    """Take in T tokens, dropping what is marked and has left the window; see `append_reference.pack`."""
    if choose(impl, k.device) == "reference":
        append_reference.pack(k, v, evict, valid, pool, lists)
        return
    from modelopt_dms.ops import library

    library.pack(k, v, evict, valid, pool, lists)


def place(
    plan: append_reference.Plan,
    k: Tensor,
    v: Tensor,
    pool: PagePool,
    lists: LayerLists,
    *,
    impl: str = "auto",
) -> None:
    """Carry out a plan of `append_reference.plan_pack`; it and this are `pack`."""
    if choose(impl, k.device) == "reference":
        append_reference.place(plan, k, v, pool, lists)
        return
    from modelopt_dms.ops import append

    with torch.cuda.device_of(k):
        append.place(plan, k, v, pool, lists)


def decode_attention(
    q: Tensor, pool: PagePool, lists: LayerLists, scoring: Scoring, *, impl: str = "auto"
) -> Tensor:
    """One query token a sequence [B, H, D] over each KV head's own slots: output [B, H, Dv]."""
    if choose(impl, q.device) == "reference":
        return decode_reference.decode_attention(q, pool, lists, scoring)
    from modelopt_dms.ops import library

    return library.decode_attention(q, pool, lists, scoring)


def decode_latent(
    q: Tensor, pool: PagePool, lists: LayerLists, scoring: Scoring, *, impl: str = "auto"
) -> Tensor:
    """As `decode_attention` where one latent list serves all heads (MLA); see `decode_reference.decode_latent`."""
    if choose(impl, q.device) == "reference":
        return decode_reference.decode_latent(q, pool, lists, scoring)
    from modelopt_dms.ops import library

    return library.decode_latent(q, pool, lists, scoring)


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    starts: Tensor | None,
    first: Tensor,
    expiry: Tensor | None,
    pool: PagePool,
    lists: LayerLists,
    scoring: Scoring,
    *,
    impl: str = "auto",
) -> Tensor:
    """T new tokens over the slots that live and among themselves; see `prefill_reference.attend_chunk`."""
    if choose(impl, q.device) == "reference":
        return prefill_reference.attend_chunk(
            q, k, v, evict, starts, first, expiry, pool, lists, scoring
        )
    from modelopt_dms.ops import library

    return library.attend_chunk(q, k, v, evict, starts, first, expiry, pool, lists, scoring)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep_logprob: Tensor,
    window: int,
    mask: Tensor | None,
    scoring: Scoring,
    *,
    impl: str = "auto",
) -> Tensor:
    """Attention among T tokens under the delayed-eviction mask, differentiable; see `reference.prefill_attention`.

    "auto" is the reference where sinks want a gradient, which the kernels do not compute.
    """
    learns_sinks = scoring.sinks is not None and scoring.sinks.requires_grad
    if impl == "auto" and learns_sinks and torch.is_grad_enabled():
        impl = "reference"
    if choose(impl, q.device) == "reference":
        return reference.prefill_attention(q, k, v, keep_logprob, window, mask, scoring)
    from modelopt_dms.ops import library

    return library.prefill_attention(
        q, k, v, keep_logprob, window, starts_of(mask, len(q)), scoring
    )


def starts_of(mask: Tensor | None, batch: int) -> Tensor | None:
    """First key [B, T] int32 that each query sees, from a bool mask [B or 1, 1, T, T]; None stays None (causal).

    The kernels know masks of this kind only: documents in a row, and padding. A row that sees nothing sees itself.

    Raises:
        ValueError: a query that does not see everything between its first key and itself.
    """
    if mask is None:
        return None
    seen = mask[:, 0]  # [B, T, T]
    T = seen.shape[-1]
    itself = torch.arange(T, device=mask.device)
    count = seen.sum(-1)
    starts = torch.where(count > 0, seen.int().argmax(-1), itself)
    if not bool((torch.where(count > 0, count, 1) == itself + 1 - starts).all()):
        raise ValueError(
            "the kernels take masks where a query sees all keys from some position to itself (causal, padding, packed "
            "documents); for others use impl='reference'"
        )
    return starts.int().expand(batch, -1).contiguous()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
