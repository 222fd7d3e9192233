# SPDX-License-Identifier: Apache-2.0
"""The attention mask of a layer with a gate: checked once a forward, refused where DMS would compute something else.

Shapes: B sequences, T new tokens, P tokens that the cache has seen, padding and evicted ones included.
"""

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_dms.gates import handover

ACCEPTED = (
    "accepted: None, or a bool (or 0 / -inf) mask [B or 1, 1, new tokens, all tokens] that is causal, hides padding or "
    "separates packed documents among the new tokens, and shows all tokens that the cache has taken in; padding stands "
    "in front of a sequence, or behind its last token"
)


class MaskError(ValueError):
    """An attention mask that a layer with a gate does not implement; the message says what was seen."""


@dataclass(frozen=True)
class _Verdict:
    """What a mask turned out to be.

    Attributes:
        plain: among the new tokens it is nothing but causal.
        padded: some of the new tokens are padding.
    """

    plain: bool
    padded: bool


def read_mask(
    layer: str,
    mask: Tensor | None,
    tokens: int,
    past: int,
    held: Tensor | None,
    owner: object | None,
) -> tuple[Tensor | None, Tensor | None]:
    """A mask as DMS reads it, and which new tokens are not padding.

    Waits for the device once a forward: the layers of one forward share their mask.

    Args:
        layer: its name, for errors.
        mask: bool or additive [B or 1, 1, T, P + T]; None is causal.
        tokens: T.
        past: P.
        held: which of the first tokens [B, N], N <= P, the cache has taken in; all later ones. None: all.
        owner: the cache, in which every layer has the same `held`.

    Returns:
        The mask as bool, None if it is causal and no more; and valid tokens [B or 1, T], None if all are.

    Raises:
        MaskError: anything else than `ACCEPTED`.
    """
    if mask is None:
        return None, None
    _check_shape(layer, mask, tokens, past)
    if torch.compiler.is_compiling():
        _assert(layer, mask, tokens, past, held)
        return _as_bool(mask), None if tokens == 1 else _itself(mask, past)
    verdict = _known(mask, past, owner)
    if verdict is None:
        verdict = _judge(layer, mask, tokens, past, held)
        _remember(mask, past, owner, verdict)
    return (
        None if verdict.plain else _as_bool(mask),
        _itself(mask, past) if verdict.padded else None,
    )


def only_padding(mask: Tensor) -> bool:
    """Whether a bool mask [B or 1, 1, T, T] is causal and hides padding, and does no more."""
    valid = mask[:, 0].diagonal(dim1=-2, dim2=-1)
    causal = torch.ones(mask.shape[2:], dtype=torch.bool, device=mask.device).tril()
    plain = (mask[:, 0] == (causal & valid[:, None])) | ~valid[..., None]
    return bool(plain.all())


def _check_shape(layer: str, mask: Tensor, tokens: int, past: int) -> None:
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != (tokens, past + tokens):
        raise MaskError(
            f"{layer}: attention_mask has shape {tuple(mask.shape)}, with {tokens} new and {past} cached tokens; "
            f"{ACCEPTED}"
        )


def _findings(mask: Tensor, tokens: int, past: int, held: Tensor | None) -> dict[str, Tensor]:
    """What is refused, each with whether [] it was found."""
    seen = _as_bool(mask)[:, 0]
    new, itself = seen[..., past:], _itself(mask, past)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    found = {
        "lets a token see later ones (bidirectional, prefix-LM)": (new & ~causal).any(),
        "shows a token that does not see itself": (new & ~itself[:, None]).any(),
    }
    if mask.dtype != torch.bool:
        bias = (mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)
        found["adds a finite bias"] = bias.any()
    shown = torch.ones(1, past, dtype=torch.bool, device=mask.device)
    if held is not None:
        shown = F.pad(held[:, :past], (0, past - min(past, held.shape[1])), value=True)
    if past:
        differs = (seen[..., :past] != shown[:, None]) & itself[..., None]
        found["hides cached tokens, or shows their padding"] = differs.any()
        found["makes all new tokens padding (it must cover the cached ones, too)"] = ~itself.any()
    found["has padding between the tokens of a sequence"] = _inner_padding(shown, itself).any()
    return found


def _inner_padding(cached: Tensor, new: Tensor) -> Tensor:
    """Padding with tokens on both sides [B, P + T]: the delay window would count it."""
    batch = max(len(cached), len(new))
    real = torch.cat([cached.expand(batch, -1), new.expand(batch, -1)], dim=1)
    before = real.cumsum(1) > 0
    after = real.flip(1).cumsum(1).flip(1) > 0
    return ~real & before & after


def _judge(layer: str, mask: Tensor, tokens: int, past: int, held: Tensor | None) -> _Verdict:
    found = _findings(mask, tokens, past, held)
    new = _as_bool(mask)[:, 0, :, past:]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    found_on_device = torch.stack(
        [(new == causal).all(), ~_itself(mask, past).all(), *found.values()]
    )
    plain, padded, *refused = found_on_device.tolist()
    for what, is_so in zip(found, refused, strict=True):
        if is_so:
            raise MaskError(f"{layer}: attention_mask {what}; {ACCEPTED}")
    return _Verdict(plain, padded)


def _assert(layer: str, mask: Tensor, tokens: int, past: int, held: Tensor | None) -> None:
    """As `_judge` on the device, for torch.compile, which cannot look at a value."""
    found = _findings(mask, tokens, past, held)
    if tokens == 1:
        found["makes a single token padding"] = ~_itself(mask, past).all()
    for what, is_so in found.items():
        torch._assert_async(~is_so, f"{layer}: attention_mask {what}; {ACCEPTED}")


def _known(mask: Tensor, past: int, owner: object | None) -> _Verdict | None:
    known = handover.get("mask")
    if known is None:
        return None
    mask_ref, owner_ref, of, verdict = known
    same = mask_ref() is mask and (
        owner_ref is None if owner is None else owner_ref is not None and owner_ref() is owner
    )
    return verdict if same and of == (past, _version(mask)) else None


def _remember(mask: Tensor, past: int, owner: object | None, verdict: _Verdict) -> None:
    # Weak: a mask takes memory with the square of the length.
    owner_ref = None if owner is None else weakref.ref(owner)
    handover.put("mask", (weakref.ref(mask), owner_ref, (past, _version(mask)), verdict))


def _version(mask: Tensor) -> int:
    """Changes when the mask is written to; tensors made under inference_mode do not count."""
    return -1 if mask.is_inference() else mask._version


def _itself(mask: Tensor, past: int) -> Tensor:
    """Whether new tokens [B or 1, T] see themselves: if not, they are padding."""
    return _as_bool(mask)[:, 0, :, past:].diagonal(dim1=-2, dim2=-1)


def _as_bool(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
