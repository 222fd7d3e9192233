# SPDX-License-Identifier: Apache-2.0
"""From a causal LM's last hidden states to its logits, for any slice of tokens."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from modelopt_dms.gates.gate import eviction_off
from modelopt_dms.modeling.divergence import Head

# The same hidden states through the same modules: only the last operations may round differently, in units of eps.
HEAD_ROUNDINGS = 4
# What a foreign token may change, as a share of what an own token changes. A leak is of the order of 1.
LEAK = 1e-2
# The same between equal runs, of what batches of other company change: chance is of the order of 1, rounding far below.
CHANCE = 0.25


class UnsupportedHeadError(ValueError):
    """A model whose logits cannot be computed in chunks; the message says how they differ."""


def output_head(model: PreTrainedModel) -> Head:
    """The function that maps hidden states [.., C] of the decoder to logits [.., V], as the model's forward does.

    After the output embeddings, models scale (Cohere `logit_scale`, Granite `logits_scaling`) or soft-cap
    (Gemma `final_logit_softcapping`) their logits; the config's fields say so.
    """
    config = model.config.get_text_config(decoder=True)
    project = model.get_output_embeddings()
    multiplier = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = project(hidden)
        if multiplier is not None:
            logits = logits * multiplier
        if divisor is not None:
            logits = logits / divisor
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    return head


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.device


def last_hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Hidden states [B, T, C] that enter the output head, of ids and positions [B, T] (packed if positions restart)."""
    decoder: nn.Module = model.get_decoder()
    masks = _masks(model, input_ids, position_ids)
    return decoder(
        input_ids=input_ids, position_ids=position_ids, attention_mask=masks, use_cache=False
    ).last_hidden_state


def _masks(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Any:
    """Attention masks of packed documents, by kind of layer where a model has several."""
    # The model would make the same masks from position_ids, but gpt-oss does not pass them on.
    shape_only = torch.empty(*input_ids.shape, 0, dtype=model.dtype, device=input_ids.device)
    return create_masks_for_generate(model.config, shape_only, None, None, position_ids)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check on a few tokens that chunks of logits equal the model's own, and that packed documents do not mix.

    The model stays in the mode it is in: so this also finds what behaves differently, or at random, in training.
    No tolerance is on what another kernel would have computed: in bfloat16, two right ways may differ by several
    percent. Every comparison is between runs of equal shapes, and a document's isolation is measured by what a
    change of the other document does to it.

    Raises:
        UnsupportedHeadError: they differ.
        FloatingPointError: weights or hidden states are not finite.
    """
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    ids = torch.arange(8, device=input_device(model))[None] % vocabulary
    with eviction_off(model):
        _check_logits(model, ids)
        _check_isolation(model, ids, (ids + max(1, vocabulary // 2)) % vocabulary)


def _check_logits(model: PreTrainedModel, ids: Tensor) -> None:
    """Logits of ids [1, T] are the head applied to the decoder's hidden states."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden = last_hidden(model, ids, positions)
    _check_finite(model, hidden)
    # The same masks as for the hidden states: a kernel for another kind of mask rounds otherwise.
    masks = _masks(model, ids, positions)
    whole = model(input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False)
    _check_finite(model, whole.logits)
    chunked = output_head(model)(hidden)
    difference = (_norm(whole.logits - chunked) / _norm(whole.logits)).item()
    allowed = HEAD_ROUNDINGS * torch.finfo(hidden.dtype).eps
    if not difference <= allowed:
        raise UnsupportedHeadError(
            f"the logits of {type(model).__name__} are not its output embeddings applied to its decoder's last hidden "
            "states (with logit_scale, logits_scaling or final_logit_softcapping); they cannot be made in chunks "
            f"(relative difference {difference:.1e}, allowed {allowed:.0e})"
        )


def _check_isolation(model: PreTrainedModel, ids: Tensor, others: Tensor) -> None:
    """Of ids [1, T] packed as two documents, the second does not see the first; `others` are other ids [1, T]."""
    border = 3
    first, second = ids[:, :border], ids[:, border:]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    packed = torch.cat([positions[:, :border], positions[:, : second.shape[1]]], dim=1)

    def second_of(*parts: Tensor) -> Tensor:
        return last_hidden(model, torch.cat(parts, dim=1), packed)[:, border:]

    def beside(row: Tensor) -> Tensor:
        # Rows of a batch never see each other; what changes is the company a token has in kernels and experts.
        both = positions[:, : second.shape[1]].expand(2, -1)
        return last_hidden(model, torch.cat([second, row]), both)[0]

    reference = second_of(first, second)
    own = second_of(first, torch.cat([others[:, border : border + 1], second[:, 1:]], dim=1))
    effect = _norm((reference - own)[:, 1:])  # of the document's own first token on those after it
    noise = _norm(beside(second) - beside(others[:, border:]))
    leak = _norm(reference - second_of(others[:, :border], second))
    if not noise <= CHANCE * effect:
        raise UnsupportedHeadError(
            f"{type(model).__name__} gives other hidden states for the same tokens (changes of {noise:.1e}, where "
            f"another token in front makes {effect:.1e}): is there dropout or other chance in its forward pass?"
        )
    if not leak <= max(LEAK * effect, 4 * noise):
        raise UnsupportedHeadError(
            f"{type(model).__name__} does not keep packed documents apart by their position_ids: another document in "
            f"front changes hidden states by {leak:.1e}, where a token of their own changes them by {effect:.1e}"
        )


def _check_finite(model: PreTrainedModel, values: Tensor) -> None:
    """Say what is wrong with numbers that are not finite: the weights, or the range of the dtype."""
    if values.isfinite().all():
        return
    broken = [
        name
        for name, x in model.named_parameters()
        if x.device.type != "meta" and x.is_floating_point() and not x.isfinite().all()
    ]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise FloatingPointError(
            f"weights that are not finite: {', '.join(broken[:3])}{more}; the checkpoint is damaged"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    advice = "use bfloat16" if dtype == "float16" else "use float32"
    raise FloatingPointError(
        f"{type(model).__name__}: hidden states are not finite (NaN or infinity) in {dtype}; {advice}"
    )


def _norm(values: Tensor) -> Tensor:
    return values.double().norm()
