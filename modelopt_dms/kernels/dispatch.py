# SPDX-License-Identifier: Apache-2.0
"""One function per op that picks its implementation.

`impl`: "triton" is the op of `kernels.library`, which runs the kernel on CUDA, or anywhere under TRITON_INTERPRET=1.
"reference" is what it means, in plain PyTorch, on any device. "auto" is triton on GPUs that run the kernels, and
reference elsewhere.
"""

import threading
import warnings
import weakref
from typing import Literal

import torch
from torch import Tensor

from modelopt_dms.kernels import (
    append_reference,
    decode_reference,
    library,
    prefill_reference,
    reference,
)
from modelopt_dms.kernels.gating import GateInput
from modelopt_dms.kernels.layout import PagePool, PageTables
from modelopt_dms.kernels.prefill_reference import Chunk
from modelopt_dms.kernels.reference import Prompt, Scoring
from modelopt_dms.kernels.rollback import UndoLog

# Per thread: the mask that `starts_of` was asked about last, and what it said.
_LAST = threading.local()
NEEDED_GPU = "a GPU of compute capability 9.0 to 11.x (Hopper, data center Blackwell)"


def choose(impl: str, device: torch.device) -> Literal["triton", "reference"]:
    """The implementation that `impl` means on this device.

    Raises:
        ValueError: an unknown name, or kernels that cannot run here.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl={impl!r} must be 'auto', 'triton' or 'reference'")
    if impl == "reference" or (impl == "auto" and device.type != "cuda"):
        return "reference"
    if device.type == "cuda" and not kernels_fit(_capability(device)):
        if impl == "auto":
            _say_what_computes(device)
            return "reference"
        raise ValueError(
            f"impl='triton' needs {NEEDED_GPU}, and {torch.cuda.get_device_name(device)} has "
            f"{'.'.join(map(str, _capability(device)))}; accepted here: 'auto', 'reference'"
        )
    if torch.compiler.is_compiling():  # what cannot run was refused when the cache was made
        return "triton"
    if not library.has_triton():
        raise ValueError(
            "impl='triton' needs Triton, which a CUDA build of PyTorch brings: pip install triton"
        )
    if device.type != "cuda" and not library.interpreting():
        raise ValueError(
            f"impl='triton' needs a CUDA device, got {device.type!r}; accepted here: 'auto', 'reference', or "
            "TRITON_INTERPRET=1 in the environment (slow, for tests)"
        )
    return "triton"


def kernels_fit(capability: tuple[int, int]) -> bool:
    """Whether GPUs of this compute capability have what the kernels use: 227 KB of shared memory, bfloat16 in pairs.

    8.0 (A100) has 163 KB; 8.6, 8.9 (Ada) and 12.x (GeForce and RTX Blackwell) have 99.
    """
    return (9, 0) <= capability < (12, 0)


def rows_fit(dim: int, group: int, dtype: torch.dtype) -> bool:
    """Whether tiles of a cache in pages fit in the 227 KB of shared memory that the kernels count on.

    As compiled for sm_90a, `decode` takes at dim 256 in bfloat16 202 KB for up to 16 query heads of a KV head, 212 for
    32 and 232 for 64; in float32 140 KB at dim 128, and 276 at 256.

    Args:
        dim: numbers of a key or value row.
        group: query heads of a KV head.
        dtype: of the model.
    """
    if dim % 8 or dim > 256:
        return False
    return dim <= 128 or (dtype != torch.float32 and group <= 32)


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _say_what_computes(device: torch.device) -> None:
    warnings.warn(
        f"the kernels need {NEEDED_GPU}, and {torch.cuda.get_device_name(device)} has "
        f"{'.'.join(map(str, _capability(device)))}: plain PyTorch computes instead, slower",
        stacklevel=3,
    )


def append_token(
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    pool: PagePool,
    lists: PageTables,
    *,
    impl: str = "auto",
    log: UndoLog | None = None,
) -> None:
    """Decide about one token of every active sequence and take it in; see `append_reference.append_token`."""
    if choose(impl, k.device) == "reference":
        append_reference.append_token(k, v, gate, pool, lists, log)
    elif log is None:
        given = {name: getattr(gate, name, None) for name in library.GATE}
        library.append_token(k, v, **library.state(pool, lists), **given)
    else:  # no op takes a log
        with torch.cuda.device_of(k):
            library.kernel_function("append.append_token")(k, v, gate, pool, lists, log)


def pack(
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    valid: Tensor | None,
    pool: PagePool,
    lists: PageTables,
    *,
    impl: str = "auto",
) -> None:
    """Take in T tokens, dropping what is marked and has left the window; see `append_reference.pack`."""
    if choose(impl, k.device) == "reference":
        append_reference.pack(k, v, evict, valid, pool, lists)
    else:
        library.pack(k, v, evict, valid, **library.state(pool, lists))


def apply_plan(
    plan: append_reference.Plan,
    k: Tensor,
    v: Tensor,
    pool: PagePool,
    lists: PageTables,
    *,
    impl: str = "auto",
) -> None:
    """Carry out a plan of `append_reference.plan_pack`; it and this are `pack`."""
    if choose(impl, k.device) == "reference":
        append_reference.apply_plan(plan, k, v, pool, lists)
    else:
        with torch.cuda.device_of(k):
            library.kernel_function("append.apply_plan")(plan, k, v, pool, lists)


def decode_attention(
    q: Tensor, pool: PagePool, lists: PageTables, scoring: Scoring, *, impl: str = "auto"
) -> Tensor:
    """One query token a sequence [B, H, D] over each KV head's own slots: output [B, H, Dv]."""
    if choose(impl, q.device) == "reference":
        return decode_reference.decode_attention(q, pool, lists, scoring)
    return library.decode(q, **library.state(pool, lists), **library.scored(scoring))


def decode_latent(
    q: Tensor, pool: PagePool, lists: PageTables, scoring: Scoring, *, impl: str = "auto"
) -> Tensor:
    """As `decode_attention` where one latent list serves all heads (MLA); see `decode_reference.decode_latent`."""
    if choose(impl, q.device) == "reference":
        return decode_reference.decode_latent(q, pool, lists, scoring)
    return library.decode_latent(q, **library.state(pool, lists), **library.scored(scoring))


def attend_chunk(
    chunk: Chunk, pool: PagePool, lists: PageTables, scoring: Scoring, *, impl: str = "auto"
) -> Tensor:
    """T new tokens over the slots that live and among themselves; see `prefill_reference.attend_chunk`."""
    if choose(impl, chunk.q.device) == "reference":
        return prefill_reference.attend_chunk(chunk, pool, lists, scoring)
    seen = {"starts": chunk.starts, "first": chunk.first, "expiry": chunk.expiry}
    tensors = (chunk.q, chunk.k, chunk.v, chunk.evict)
    return library.attend_chunk(
        *tensors, **seen, **library.state(pool, lists), **library.scored(scoring)
    )


def prefill_attention(prompt: Prompt, scoring: Scoring, *, impl: str = "auto") -> Tensor:
    """Attention among T tokens under the delayed-eviction mask, differentiable; see `reference.prefill_attention`.

    "auto" is the reference where sinks want a gradient, which the kernels do not compute.

    Raises:
        ValueError: what the kernels do not compute: that gradient, or masks that `starts_of` refuses.
    """
    sinks = scoring.sinks
    learns_sinks = sinks is not None and sinks.requires_grad and torch.is_grad_enabled()
    if impl == "auto" and learns_sinks:
        impl = "reference"
    if choose(impl, prompt.q.device) == "reference":
        return reference.prefill_attention(prompt, scoring)
    if learns_sinks:
        raise ValueError(
            "the prefill kernel has no gradient of sinks; freeze them or use impl='reference'"
        )
    tensors = (prompt.q, prompt.k, prompt.v, prompt.keep_logprob)
    starts = starts_of(prompt.mask, len(prompt.q))
    return library.prefill(*tensors, starts, sinks, prompt.window, scoring.scale, scoring.softcap)[
        0
    ]


def starts_of(mask: Tensor | None, batch: int) -> Tensor | None:
    """First of the new keys [B, T] int32 that each query sees, from a mask [B or 1, 1, T, S] of which T keys are new.

    None stays None (causal). The kernels take masks of this kind only: documents in a row, and padding. A row that sees
    nothing sees itself. Waits for the device once for all layers of a forward, which share their mask.

    Raises:
        ValueError: a query that does not see everything between its first key and itself.
    """
    if mask is None:
        return None
    # Tensors made under inference_mode do not count what is written to them.
    if torch.compiler.is_compiling() or mask.is_inference():
        return _first_seen(mask, batch)
    state = (batch, mask._version)
    last = getattr(_LAST, "mask", None)
    if last is None or last[0]() is not mask or last[1] != state:
        # Weak: a mask takes memory with the square of the length.
        last = _LAST.mask = (weakref.ref(mask), state, _first_seen(mask, batch))
    return last[2]


def _first_seen(mask: Tensor, batch: int) -> Tensor:
    T = mask.shape[-2]
    seen = mask[:, 0, :, -T:]  # [B, T, T]
    itself = torch.arange(T, device=mask.device)
    count = seen.sum(-1)
    # As bytes, not as integers: those would be a copy of four times the mask's size.
    starts = torch.where(count > 0, seen.view(torch.uint8).argmax(-1), itself)
    if not bool((torch.where(count > 0, count, 1) == itself + 1 - starts).all()):
        raise ValueError(
            "the kernels take masks where a query sees all keys from some position to itself (causal, padding, packed "
            "documents); for others use impl='reference'"
        )
    return starts.int().expand(batch, -1).contiguous()
