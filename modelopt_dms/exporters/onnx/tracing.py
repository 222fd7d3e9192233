# SPDX-License-Identifier: Apache-2.0
"""A DMS model as two functions of tensors only: a decode step, and a chunk of a prompt.

What a cache object holds elsewhere goes in and comes out as tensors, layer by layer, in the order of `slots.STATE`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from modelopt_dms.exporters.onnx.slots import CHANGED, STATE, GraphLayer, GraphSlots, SlotFormat
from modelopt_dms.kvcache.hf_cache import cache_argument
from modelopt_dms.modeling.convert import dms_modules


class Step(nn.Module):
    """A forward of the model on a state of tensors: logits [B, V] of the last token, and the state's next value."""

    def __init__(self, model: PreTrainedModel, form: SlotFormat, scales: list[Tensor]) -> None:
        """Wrap a model.

        Args:
            model: all of whose attention layers are DMS layers.
            form: what their slots have in common.
            scales: of each layer's KV formats [4, K] float32.
        """
        super().__init__()
        self.model = model
        self.form = form
        self.scales = nn.ParameterList([nn.Parameter(x, requires_grad=False) for x in scales])

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        active: Tensor | None,
        padding: Tensor | None,
        state: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """One forward; see `Decode` and `Prefill`."""
        model: Any = self.model
        cache = DynamicCache(config=model.config)
        held = []
        for index, scales in enumerate(self.scales):
            given = state[index * len(STATE) : (index + 1) * len(STATE)]
            slots = GraphSlots(
                self.form, dict(zip(STATE, given, strict=True)), scales, active, padding
            )
            cache.layers[index] = GraphLayer(slots)
            held.append(slots)
        out = model(
            input_ids=input_ids,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(type(model).forward, cache),
        )
        changed = [slots.tensors[name] for slots in held for name in CHANGED]
        return (out.logits[:, -1].float(), *changed)


class Decode(Step):
    """One token of every sequence."""

    def forward(
        self, input_ids: Tensor, positions: Tensor, active: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """Args: ids [B, 1], their positions [B, 1], which sequences [B] bool take in their token."""
        return self.run(input_ids, positions, active, None, list(state))


class Prefill(Step):
    """T tokens of every sequence, the first `padding` of which are none."""

    def forward(
        self, input_ids: Tensor, positions: Tensor, padding: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """Args: ids [B, T], their positions [B, T], padding [B] int32."""
        return self.run(input_ids, positions, None, padding, list(state))


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model's experts are computed by matrix products, without loops over who was chosen."""
    config: Any = model.config
    before = getattr(config, "_experts_implementation", None)
    usages = {x: x.__dict__.get("dms_usages") for x in dms_modules(model).values()}
    try:
        if before is not None:
            model.set_experts_implementation("batched_mm")
        with torch.no_grad():
            yield
    finally:
        if before is not None:
            model.set_experts_implementation(before)
        for module, usage in usages.items():
            module.dms_usages = usage
