# SPDX-License-Identifier: Apache-2.0
"""Which models a graph can hold, and what it must know of them."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modelopt_dms.exporters import ExportError
from modelopt_dms.exporters.onnx import quantizers
from modelopt_dms.kernels.layout import MOST_ROWS, PageTables
from modelopt_dms.kvcache.kv_format import kv_formats
from modelopt_dms.modeling.convert import dms_modules
from modelopt_dms.modeling.generation import looking_rope
from modelopt_dms.runtime.manifest import Model


def model_of(model: PreTrainedModel) -> Model:
    """What a manifest says of a model.

    Raises:
        ExportError: a graph cannot hold it; the message says what is in the way.
    """
    modules = dms_modules(model)
    config: Any = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if not modules:
        raise ExportError(f"{name} has no gates; call apply_dms (or compress) first")
    others = config.num_hidden_layers - len(modules)
    if others:
        raise ExportError(
            f"{name} has {others} layers without a gate (sliding-window, or left out by dms.layers); a graph holds "
            "models all of whose attention layers are DMS layers"
        )
    if any(hasattr(x, "expand_kv") for x in modules.values()):
        raise ExportError(f"{name} caches latents (MLA), which a graph cannot hold yet")
    if any(getattr(x, "sinks", None) is not None for x in modules.values()):
        raise ExportError(f"{name} has attention sinks, which a graph cannot hold yet")
    rope = looking_rope(model)
    if rope is not None:
        raise ExportError(
            f"{name} has a {rope} rotary embedding, which looks at positions; a graph cannot"
        )
    first: Any = next(iter(modules.values()))
    gate, kv_heads = first.dms_gate, first.dms_gate.kv_heads
    heads, dim = config.num_attention_heads, first.head_dim
    if heads // kv_heads > MOST_ROWS:
        raise ExportError(
            f"{name} has {heads // kv_heads} query heads a KV head; kernels take {MOST_ROWS}"
        )
    quantizers.check(model)
    numbers = {_numbers(x) for x in modules.values()}
    if len(numbers) > 1:
        raise ExportError(
            f"layers of {name} store keys and values differently; a graph has one format"
        )
    keys, values = numbers.pop()
    eos = model.generation_config.eos_token_id
    return Model(
        architecture=next(
            x.__name__ for x in type(model).__mro__ if x.__module__.startswith("transformers.")
        ),
        layers=len(modules),
        kv_heads=kv_heads,
        heads=heads,
        key_dim=dim,
        value_dim=dim,
        vocabulary=config.vocab_size,
        dtype=str(model.dtype).removeprefix("torch."),
        window=gate.window,
        shift=gate.shift,
        key_number=keys,
        value_number=values,
        eos=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def scales_of(model: PreTrainedModel) -> list[Tensor]:
    """What encoding and decoding rows multiply by, by layer: [4, K] float32; see `kernels.layout.PageTables`."""
    found = []
    for module in dms_modules(model).values():
        gate: Any = module.dms_gate
        active = torch.ones(1, dtype=torch.bool)
        lists = PageTables.make(1, gate.kv_heads, 1, 0, 0, active, kv_formats(module))
        found.append(lists.scales.to(model.device))
    return found


def _numbers(module: Any) -> tuple[str, str]:
    keys, values = ("plain" if x is None else x.name for x in kv_formats(module))
    return keys, values
