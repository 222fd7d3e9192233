# SPDX-License-Identifier: Apache-2.0
"""What TensorRT-LLM's AutoDeploy is told about DMS: an attention backend and a model factory. Gated by version.

`register` is the only entry; nothing here imports tensorrt_llm before it is called. None of it has run with a real
TensorRT-LLM: docs/trtllm.md says what it was checked against.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from modelopt_dms.checkpoints.unified_hf import kv_ranges
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.exporters.trtllm import graph, ops, state
from modelopt_dms.modeling.convert import dms_modules
from modelopt_dms.modeling.mode import apply_dms

NAME = "dms"  # of the attention backend
FACTORY = "modelopt_dms"  # of the model factory
ACCEPTED = ">=1.3.0rc0,<1.4"
TRANSFORMERS = ">=5.21,<5.25"
AUTO_DEPLOY = "tensorrt_llm._torch.auto_deploy"
# What is used of each module, by the paths that they have in every version that was read.
USED = {
    f"{AUTO_DEPLOY}.custom_ops.attention_interface": (
        "AttentionDescriptor",
        "AttentionRegistry",
        "BatchInfo",
        "ResourceHandler",
    ),
    f"{AUTO_DEPLOY}.models.hf": ("AutoModelForCausalLMFactory", "ModelFactoryRegistry"),
}


class BackendError(RuntimeError):
    """This TensorRT-LLM cannot serve a DMS model; the message says what was found and what is accepted."""


def register() -> None:
    """Make AutoDeploy know attn_backend "dms" and model_factory "modelopt_dms". A second call does nothing.

    Raises:
        BackendError: TensorRT-LLM or transformers is missing or of another version, or AutoDeploy's interface is not
            the one that this was written for.
    """
    version = _version()
    interface, models = (_module(path, version) for path in USED)
    if interface.AttentionRegistry.has(NAME):
        return
    _check_batch_info(interface, version)
    descriptor = _descriptor(interface)
    missing = sorted(getattr(descriptor, "__abstractmethods__", ()))
    if missing:
        raise BackendError(
            _changed(version, f"AttentionDescriptor also wants {', '.join(missing)}")
        )
    if "_build_model" not in vars(models.AutoModelForCausalLMFactory):
        raise BackendError(_changed(version, "AutoModelForCausalLMFactory has no _build_model"))
    models.ModelFactoryRegistry.register(FACTORY)(_factory(models))
    interface.AttentionRegistry.register(NAME)(descriptor)


def _version() -> str:
    found = str(import_module("transformers").__version__)
    if not SpecifierSet(TRANSFORMERS).contains(found):
        raise BackendError(
            f"modelopt_dms needs transformers {TRANSFORMERS}, found {found}: TensorRT-LLM pins a "
            "version of its own; install the needed one after it"
        )
    try:
        version = str(import_module("tensorrt_llm").__version__)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"TensorRT-LLM {ACCEPTED} is needed, and is not installed ({error}); pip install tensorrt-llm, or use "
            "NVIDIA's container"
        ) from error
    if not SpecifierSet(ACCEPTED).contains(version, prereleases=True):
        raise BackendError(f"TensorRT-LLM {version} is installed; accepted: {ACCEPTED}")
    return version


def _module(path: str, version: str) -> ModuleType:
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        raise BackendError(_changed(version, f"{path} cannot be imported ({error})")) from error
    lacking = [name for name in USED[path] if not hasattr(module, name)]
    if lacking:
        raise BackendError(_changed(version, f"{path} lacks {', '.join(lacking)}"))
    return module


def _check_batch_info(interface: ModuleType, version: str) -> None:
    """The numbers of `batch_info_host` must stand where `ops` reads them: they moved before."""
    given = torch.tensor([1, 5, 2, 6, 3, 3, *[0] * 58], dtype=torch.int32)
    try:
        info = interface.BatchInfo(given)
        found = (tuple(info.get_num_sequences()), tuple(info.get_num_tokens()))
    except Exception as error:  # whatever another version's constructor or reader does with it
        raise BackendError(_changed(version, f"BatchInfo cannot be read ({error!r})")) from error
    if found != ((1, 2, 3), (5, 6, 3)):
        raise BackendError(_changed(version, f"BatchInfo reads {found}"))


def _changed(version: str, what: str) -> str:
    return (
        f"TensorRT-LLM {version} has another AutoDeploy interface than modelopt_dms was written for: {what}; "
        "see docs/trtllm.md for what was read"
    )


def _descriptor(interface: Any) -> Any:
    class DmsAttention(interface.AttentionDescriptor):
        """Attention on a cache that forgets, head by head."""

        @classmethod
        def get_attention_layout(cls) -> str:
            return "bsnd"

        @classmethod
        def get_num_qkv_args(cls) -> int:
            return len(ops.TENSORS)

        @classmethod
        def get_source_attention_op(cls) -> Any:
            return ops.SOURCE

        @classmethod
        def get_cached_attention_op(cls) -> Any:
            return ops.CACHED.default

        @classmethod
        def get_standard_metadata_args(cls) -> list[str]:
            return list(ops.METADATA)

        @classmethod
        def get_cache_initializers(cls, source_attn_node: Any, cache_config: Any) -> dict[str, Any]:
            layer = layer_of(source_attn_node)
            return {name: DmsState(name, layer) for name in state.STATE}

        @classmethod
        def get_constants(cls, source_attn_node: Any) -> list[Any]:
            given = arguments(source_attn_node)
            return [given[name] for name in ops.CONSTANTS]

        # Versions that know layers which share a cache, or kernels that know sliding windows, ask for these.
        @classmethod
        def get_layer_idx(cls, source_attn_node: Any) -> None:
            return None

        @classmethod
        def get_shared_kv_source_layer_idx(cls, source_attn_node: Any) -> None:
            return None

        @classmethod
        def supports_shared_kv(cls) -> bool:
            return False

        @classmethod
        def kernel_handles_cyclic_swa(cls) -> bool:
            return False

    class DmsState(interface.ResourceHandler):
        """One of a layer's tensors: not the engine's to page, to reuse or to resize."""

        def __init__(self, name: str, layer: state.Layer) -> None:
            self.name = name
            self.layer = layer

        def allocate(self, sequence_info: Any) -> torch.Tensor:
            slots = sequence_info.max_num_state_slots
            device = torch.device(sequence_info.device)
            return self.layer.tensor(self.name, slots, sequence_info.max_seq_len, device)

    return DmsAttention


def _factory(models: Any) -> Any:
    class DmsFactory(models.AutoModelForCausalLMFactory):
        """transformers' own model with gates, instead of one that AutoDeploy wrote anew without hooks."""

        _custom_model_mapping: dict[str, Any] = {}

        def _build_model(self, device: Any) -> Any:
            model = super()._build_model(device)
            return open_gates(model, Path(self.model))

    return DmsFactory


def open_gates(model: Any, checkpoint: Path) -> Any:
    """Put the gates that its config tells of on a model without weights, and make it ready for `torch.export`.

    Args:
        model: of transformers, built from the checkpoint's config.
        checkpoint: directory that `export_trtllm` wrote; gives the ranges of FP8 keys and values.

    Raises:
        BackendError: the config tells of no gates.
        ExportError: see `graph.check_servable`.
    """
    dms_config = getattr(model.config, "dms_config", None)
    if dms_config is None:
        raise BackendError(
            f"{checkpoint} is not a DMS checkpoint: its config.json has no dms_config; use model_factory "
            "AutoModelForCausalLM"
        )
    del model.config.dms_config
    apply_dms(model, DMSConfig(**dms_config))
    return graph.prepare(model.eval(), kv_ranges(checkpoint, dms_modules(model)))


def layer_of(node: Any) -> state.Layer:
    """What the tensors of the layer behind a `gated_attention` node must be made for."""
    given = arguments(node)
    key, value = (given[name].meta["val"] for name in ("key", "value"))
    return state.Layer(
        heads=int(key.shape[2]),
        key_dim=int(key.shape[3]),
        value_dim=int(value.shape[3]),
        dtype=key.dtype,
        **{
            name: given[name]
            for name in ("window", "shift", "pool_ratio", "key_amax", "value_amax")
        },
    )


def arguments(node: Any) -> dict[str, Any]:
    """The arguments of a `gated_attention` node by name, defaults included."""
    declared = ops.SOURCE.default._schema.arguments
    given = {x.name: x.default_value for x in declared if x.has_default_value()}
    given |= dict(zip((x.name for x in declared), node.args, strict=False))
    return given | dict(node.kwargs)
