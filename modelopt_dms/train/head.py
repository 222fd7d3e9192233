# SPDX-License-Identifier: Apache-2.0
"""From a causal LM's last hidden states to its logits, for any slice of tokens. Knows no training."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from modelopt_dms.gate import eviction_off
from modelopt_dms.train.loss import Head

# Allowed |difference| / |value| between two ways of computing the same logits, by size of the dtype in bytes.
TOLERANCE = {8: 1e-5, 4: 1e-3, 2: 5e-2}


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
    # The model would make the same masks from position_ids, but gpt-oss does not pass them on.
    shape_only = torch.empty(*input_ids.shape, 0, dtype=model.dtype, device=input_ids.device)
    masks = create_masks_for_generate(model.config, shape_only, None, None, position_ids)
    return decoder(
        input_ids=input_ids, position_ids=position_ids, attention_mask=masks, use_cache=False
    ).last_hidden_state


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check on a few tokens that chunks of logits equal the model's own, and that packed documents do not mix.

    The model stays in the mode it is in: so this also finds what behaves differently, or at random, in training.

    Raises:
        UnsupportedHeadError: they differ.
    """
    head = output_head(model)
    positions = torch.arange(8, device=input_device(model))[None]
    ids = positions % cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    with eviction_off(model):
        whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        _compare(
            whole,
            head(last_hidden(model, ids, positions)),
            f"the logits of {type(model).__name__} are not its output embeddings applied to its decoder's last hidden "
            "states (with logit_scale, logits_scaling or final_logit_softcapping); they cannot be made in chunks",
        )
        first = head(last_hidden(model, ids[:, :3], positions[:, :3]))
        second = head(last_hidden(model, ids[:, 3:], positions[:, :5]))
        packed = torch.cat([positions[:, :3], positions[:, :5]], dim=1)
        _compare(
            torch.cat([first, second], dim=1),
            head(last_hidden(model, ids, packed)),
            f"{type(model).__name__} does not keep packed documents apart by their position_ids",
        )


def _compare(expected: Tensor, found: Tensor, message: str) -> None:
    tolerance = TOLERANCE[expected.element_size()]
    difference = ((expected.double() - found.double()).norm() / expected.double().norm()).item()
    if not difference <= tolerance:
        raise UnsupportedHeadError(
            f"{message} (relative difference {difference:.1e}, allowed {tolerance:.0e})"
        )
