# SPDX-License-Identifier: Apache-2.0
"""Three tokens through a model with gates, before it is converted: do its layers call attention in a way DMS knows?"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modelopt_dms.gates.gate import EvictionGate
from modelopt_dms.kvcache.hf_cache import cache_argument, cache_of
from modelopt_dms.modeling.staging import put_gate, use_dms

Plan = Mapping[str, tuple[nn.Module, EvictionGate]]


def probe(model: PreTrainedModel, plan: Plan) -> str | None:
    """What goes wrong when a model runs with these gates, one line; None if nothing does. The model is left as it was.

    Not for models whose weights are on the meta device or offloaded: they cannot run, or take long.
    """
    if any(x.is_meta for x in model.parameters()):
        return None
    running: list[str] = []
    try:
        with _gates(model, plan, running):
            _run(model)
    except Exception as error:
        try:
            _run(model)
        except Exception:
            return None  # it needs other inputs than token ids: nothing can be said about it
        name = running[-1] if running else next(iter(plan))
        what = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"{name} ({type(plan[name][0]).__name__}) calls attention in a way that DMS does not know: {what}; leave "
            "such layers out (dms.layers)"
        )
    return None


@torch.no_grad()
def _run(model: PreTrainedModel) -> None:
    """Two tokens, and one more on what they left in the cache."""
    training = [x for x in model.modules() if x.training]
    model.eval()
    try:
        ids = torch.tensor([[0, 1, 0]], device=model.get_input_embeddings().weight.device)
        out = model(input_ids=ids[:, :2], use_cache=True)
        given = cache_argument(type(model).forward, cache_of(out))
        model(input_ids=ids[:, 2:], use_cache=True, **given)
    finally:
        for module in training:
            module.training = True


@contextmanager
def _gates(model: PreTrainedModel, plan: Plan, running: list[str]) -> Iterator[None]:
    """Inside, the model runs with gates, and `running` ends with the layer that runs or ran last."""

    def enter(name: str, *_: Any) -> None:
        running.append(name)

    modules = [module for module, _ in plan.values()]
    handles = []
    undo = None
    try:
        for name, (module, gate) in plan.items():
            handles.append(module.register_forward_pre_hook(partial(enter, name)))
            handles += put_gate(module, gate)
        undo = use_dms(model, modules)
        yield
    finally:
        if undo is not None:
            undo()
        for handle in handles:
            handle.remove()
        for module in modules:
            if "dms_gate" in module._modules:
                del module.dms_gate
            vars(module).pop("dms_usages", None)
