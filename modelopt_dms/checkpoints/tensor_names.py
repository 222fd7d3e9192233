# SPDX-License-Identifier: Apache-2.0
"""Names of tensors in a checkpoint -> in the model, where transformers renames or fuses what it loads."""

from collections.abc import Container
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from modelopt_dms.checkpoints.lost_gates import GateNames

GATE_KEY = ".dms_gate."


class StoredNames:
    """The names that tensors of a model's checkpoint have in the model.

    Args:
        model: with everything on it that the checkpoint holds.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self.prefix = model.base_model_prefix
        self.state: dict[str, Any] = model.state_dict()
        self.renamings = [
            x for x in conversions if isinstance(x, WeightRenaming) and not isinstance(x, GateNames)
        ]
        self.converters = [x for x in conversions if isinstance(x, WeightConverter)]

    def of(self, key: str) -> str:
        """The name of the tensor that a stored one becomes, or becomes a part of."""
        if key in self.state:
            return key
        # Gates lie inside of modules whose own tensors are fused; they never are.
        converters = [] if GATE_KEY in key else self.converters
        # A base model and one with a head differ by a prefix, which is added or taken away where it fits.
        return rename_source_key(key, self.renamings, converters, self.prefix, self.state)[0]

    def quantizer(self, name: str, known: Container[str]) -> str | None:
        """The name of a quantizer among the known ones; None if it is not one of them."""
        candidates = [name, rename_source_key(name, self.renamings, [])[0]]
        module, _, kind = name.rpartition(".")
        fused = rename_source_key(f"{module}.weight", self.renamings, self.converters)[0]
        if fused != f"{module}.weight":
            expert = next((x for x in reversed(module.split(".")) if x.isdigit()), "")
            candidates += [f"{fused}_{kind}", f"{fused}_{kind}s.{expert}"]
            candidates.append(f"{fused.removesuffix('.weight')}.{kind}")
        return next((x for x in candidates if x in known), None)
