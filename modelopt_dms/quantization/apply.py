# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's quantization of a DMS model: gates left out, KV quantizers that the cache can store, NVFP4 on CPUs too."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelopt_dms.config.quantize import QuantizationConfig, quantization_to_dict
from modelopt_dms.kernels.number_formats import BLOCK, Nvfp4
from modelopt_dms.kvcache.kv_format import KVFormatError, kv_formats, row_format
from modelopt_dms.modeling.config_marks import mark
from modelopt_dms.modeling.convert import dms_modules
from modelopt_dms.quantization.foreign import quantized_by_us
from modelopt_dms.quantization.nvfp4_backend import NVFP4_BACKEND
from modelopt_dms.quantization.ranges import round_scales


class QuantizationError(ValueError):
    """A quantization that cannot be done; the message says why."""


def quantize(
    model: PreTrainedModel,
    config: QuantizationConfig | dict[str, Any],
    batches: Iterable[Tensor | Mapping[str, Tensor]] | Callable[[PreTrainedModel], Any] = (),
) -> PreTrainedModel:
    """Quantize weights, activations and KV cache of a causal LM in place, as ModelOpt does; apply DMS before it.

    From then on, weights and activations are fake-quantized, and the KV cache of DMS layers holds its rows really in
    the format of the KV quantizers. Layers that cache a latent (MLA) keep it in the model's dtype.

    Args:
        model: in eval mode.
        config: ModelOpt's `quant_cfg` and `algorithm`, and what the recipe's section `quantize` adds.
        batches: what to calibrate with: token ids [B, T] or arguments of the model's forward, one after the other; or
            a function that runs the model, as `mtq.quantize` takes it.

    Raises:
        QuantizationError: the model is quantized already.
        KVFormatError: the cache cannot store what the KV quantizers would compute; nothing was changed.
    """
    config = config if isinstance(config, QuantizationConfig) else QuantizationConfig(**config)
    check_quantization(model, config)
    full = _complete(model, config)
    if not callable(batches) and isinstance(batches, Sequence) and not batches:
        _check_no_amax_is_needed(config)
    latent = [name for name, x in dms_modules(model).items() if hasattr(x, "expand_kv")]
    if latent and _kv_entries(config):
        warnings.warn(
            f"{len(latent)} layers cache a latent (MLA) and keep it in {model.dtype}: ModelOpt's KV quantizers are for "
            "keys and values",
            stacklevel=2,
        )

    def calibrate(network: Any) -> None:
        if callable(batches):
            batches(network)
            return
        for batch in batches:
            arguments = batch if isinstance(batch, Mapping) else {"input_ids": batch}
            network(**{name: x.to(model.device) for name, x in arguments.items()}, use_cache=False)

    insert(model, full, calibrate)
    round_scales(model)
    for module in dms_modules(model).values():
        kv_formats(module)
    return model


def check_quantization(model: PreTrainedModel, config: QuantizationConfig) -> None:
    """Raise what `quantize` would raise, before any work."""
    if is_quantized(model):
        raise QuantizationError(
            "the model is quantized already; start from the original checkpoint"
        )
    _check_kv(config)


def insert(model: PreTrainedModel, config: QuantizationConfig, calibrate: Any = None) -> None:
    """Put ModelOpt's quantizers of a complete config into a model; without `calibrate`, they have no ranges."""
    quant_cfg = [x.model_dump(exclude_unset=True) for x in config.quant_cfg]
    algorithm = None if calibrate is None else config.model_dump()["algorithm"]
    with torch.no_grad(), quantized_by_us():
        mtq.quantize(model, {"quant_cfg": quant_cfg, "algorithm": algorithm}, calibrate)
    # Plain transformers keeps unknown config fields: what a later load needs survives in config.json, whose keys are
    # text.
    model.config.dms_quantization = json.loads(json.dumps(quantization_to_dict(config)))
    mark(model.config)


def is_quantized(model: nn.Module) -> bool:
    """Whether ModelOpt has put quantizers into a model."""
    return any(isinstance(x, TensorQuantizer) for x in model.modules())


def quantization_of(model: PreTrainedModel) -> QuantizationConfig | None:
    """How a model was quantized, as it says of itself; None if it was not."""
    held = getattr(model.config, "dms_quantization", None)
    return None if held is None else QuantizationConfig(**held)


def quantizes(model: nn.Module) -> bool:
    """Whether any quantizer of a model does something."""
    return any(isinstance(x, TensorQuantizer) and x.is_enabled for x in model.modules())


def _complete(model: PreTrainedModel, config: QuantizationConfig) -> QuantizationConfig:
    """The config with what this model and this machine add: no gates, no latents, NVFP4 without a GPU."""
    data = quantization_to_dict(config)
    entries = [dict(x) for x in data["quant_cfg"]]
    if model.device.type == "cpu":
        for entry, known in zip(entries, config.quant_cfg, strict=True):
            if _is_nvfp4(known.cfg):
                entry["cfg"] = entry["cfg"] | {"backend": NVFP4_BACKEND}
    entries.append({"quantizer_name": "*dms_*", "enable": False})
    # ModelOpt's wildcards reach the inputs of LayerNorm, but no checkpoint format and no engine knows them.
    entries.append({"parent_class": "nn.LayerNorm", "quantizer_name": "*", "enable": False})
    for name, module in dms_modules(model).items():
        if hasattr(module, "expand_kv"):
            entries.append({"quantizer_name": f"{name}.[kv]_bmm_quantizer", "enable": False})
    return QuantizationConfig(**(data | {"quant_cfg": entries}))


def _is_nvfp4(attributes: Any) -> bool:
    if attributes is None or isinstance(attributes, list):
        return False
    blocks = attributes.block_sizes or {}
    return (
        attributes.num_bits == (2, 1)
        and blocks.get("type") == "dynamic"
        and blocks.get("scale_bits") == (4, 3)
        and blocks.get(-1) == BLOCK
    )


def _check_kv(config: QuantizationConfig) -> None:
    """Refuse KV quantizers that the cache cannot store, before anything is calibrated."""
    for entry in _kv_entries(config):
        quantizer = TensorQuantizer(entry.cfg)
        if not quantizer._dynamic and not quantizer._use_constant_amax:
            quantizer.amax = torch.ones(())
        row_format(quantizer)


def _check_no_amax_is_needed(config: QuantizationConfig) -> None:
    """Refuse, before any work, quantizers of activations and KV that need data where there are none."""
    for entry in config.quant_cfg:
        if "input" not in entry.quantizer_name or entry.enable is False or entry.cfg is None:
            continue
        for cfg in entry.cfg if isinstance(entry.cfg, list) else [entry.cfg]:
            quantizer = TensorQuantizer(cfg)
            if quantizer.is_enabled and not (quantizer._dynamic or quantizer._use_constant_amax):
                raise QuantizationError(
                    f"the quantizers {entry.quantizer_name!r} need batches to calibrate with; pass batches"
                )
    for entry in _kv_entries(config):
        quantizer = TensorQuantizer(entry.cfg)
        if quantizer.is_enabled and not quantizer._use_constant_amax:
            try:
                row_format(quantizer)
            except KVFormatError:
                raise KVFormatError(
                    f"the KV quantizers {entry.quantizer_name!r} need batches to calibrate with; pass batches"
                ) from None


def _kv_entries(config: QuantizationConfig) -> list[Any]:
    """Entries that give keys or values a number format."""
    return [
        entry
        for entry in config.quant_cfg
        if entry.cfg is not None
        and entry.parent_class is None
        and any(fnmatch(f"{x}_bmm_quantizer", entry.quantizer_name) for x in "kv")
    ]


def fake_nvfp4(inputs: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """What ModelOpt's dynamic NVFP4 computes on a GPU, anywhere; gradients pass straight through."""
    amax = quantizer._get_amax(inputs).float().amax().clamp(min=torch.finfo(torch.float32).tiny)
    form = Nvfp4(amax.view(1))
    values = form.decode(form.encode(inputs.detach()), inputs.shape[-1], inputs.dtype)
    return inputs + (values - inputs).detach() if inputs.requires_grad else values
