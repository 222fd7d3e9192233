# SPDX-License-Identifier: Apache-2.0
"""How `from_pretrained` of transformers loads a DMS directory: by a registered quantizer, which puts the gates on.

Importing this registers it. Two fields of config.json bring it about. `quant_method` names the quantizer. Where it is
not registered, transformers would only warn and run the model without gates; so `fusion_config` asks for a runtime
patch that transformers does not have, which it refuses by name.

It is imported while transformers is (see `registering`), so everything else of ours is imported where it is used.
"""

from importlib import import_module
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from modelopt_dms.modeling.config_marks import ATTENTION, QUANT_METHOD

# A quantizer of ModelOpt has no other tensors than these.
OUR_TENSORS = (r"\.dms_gate\.", r"\._amax$", r"\._pre_quant_scale$")


@register_quantization_config(QUANT_METHOD)
class DMSLoadingConfig(QuantizationConfigMixin):
    """`quantization_config` of a DMS directory; what the model is stands in `dms_config` and `dms_quantization`."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD


@register_quantizer(QUANT_METHOD)
class DMSLoader(HfQuantizer):
    """Puts gates, and ModelOpt's quantizers, on a model that `from_pretrained` has loaded."""

    files: list[str] | None = None

    def update_attn_implementation(self, config: Any) -> Any:
        """Refuse what cannot be loaded, before anything is read.

        Raises:
            ValueError: another attention implementation is asked for, or the config is not the one that was saved.
        """
        asked = config._attn_implementation
        if asked not in (None, "dms", ATTENTION):
            raise ValueError(
                f"attn_implementation={asked!r}: a DMS model runs only with its own; leave the argument out"
            )
        if not any(getattr(config, x, None) for x in ("dms_config", "dms_quantization")):
            raise ValueError(
                f"{type(config).__name__} holds no dms_config: a DMS directory is loaded as the class that its "
                "config.json names under architectures, or by modelopt_dms.load"
            )
        if asked is not None:
            config._attn_implementation = None
        for field in ("fusion_config", "attn_implementation"):
            vars(config).pop(field, None)
        return config

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Without what refuses the weights of gates: they are put on afterwards."""
        lost = import_module("modelopt_dms.checkpoints.lost_gates").GateNames
        kept = [x for x in weight_conversions if not isinstance(x, lost)]
        found: list[Any] = super().update_weight_conversions(kept, model)
        return found

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files:
            raise ValueError(
                "a DMS model is loaded from its directory; with state_dict=..., use modelopt_dms.load"
            )
        self.files = list(checkpoint_files)
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, *OUR_TENSORS}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # It is no quantizer of weights: casting, training and saving are as of any model.
        self.remove_quantization_config(model)
        for module in model.modules():
            vars(getattr(module, "config", self)).pop("_is_quantized", None)
        assert self.files is not None
        import_module("modelopt_dms.checkpoints.load").attach(model, self.files)
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained."""
        return True
