# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM's hooks are as the plug-in uses them. A script for vLLM's own interpreter; prints what is not, as JSON.

A method of ours that overrides one of vLLM's must take what that one takes; names that we use must be there.
"""

import inspect
import json
import sys
from typing import Any


def changed_methods(ours: type) -> list[str]:
    """Methods that vLLM calls with something that ours do not take, or that it does not have any more."""
    found = []
    for name, method in vars(ours).items():
        if name.startswith("__") and name != "__init__":
            continue
        if not callable(method) and not isinstance(method, classmethod | staticmethod):
            continue
        bases = [x for x in ours.__mro__[1:] if x.__module__.startswith("vllm") and name in vars(x)]
        if not bases:
            continue
        theirs = inspect.signature(getattr(bases[0], name)).parameters
        mine = inspect.signature(getattr(ours, name)).parameters
        anything = {x.kind for x in mine.values()} & {inspect.Parameter.VAR_KEYWORD}
        missing = [x for x in theirs if x not in mine]
        if missing and not anything:
            found.append(f"{ours.__name__}.{name} lacks {missing} of {bases[0].__name__}'s")
        positional = [x for x, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        order = [x for x in mine if x in positional]
        if order != [x for x in positional if x in order]:
            found.append(f"{ours.__name__}.{name} has its parameters in another order")
    return found


def overriding(ours: type, names: list[str]) -> list[str]:
    """Names that ours must override, not add."""
    bases = [x for x in ours.__mro__[1:] if x.__module__.startswith("vllm")]
    return [
        f"{ours.__name__}.{name} overrides nothing"
        for name in names
        if not any(hasattr(x, name) for x in bases)
    ]


def report() -> list[str]:
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils import config as parsers
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from modelopt_dms.serving.vllm import attention, config, connector, model, scheduling

    found: list[str] = []
    # Attention's and AttentionImpl's forward are called by ourselves only.
    called_by_us = {"DMSAttention.forward", "DMSImpl.forward", "DMSAttention.__init__"}
    kinds: list[Any] = [
        attention.DMSMetadataBuilder,
        attention.DMSImpl,
        attention.DMSBackend,
        attention.DMSAttention,
        config.DMSConfigParser,
        config.DMSSettings,
        connector.DMSConnector,
        connector.FromWorkers,
        model.GatedBase,
        scheduling.DMSManager,
        scheduling.DMSSpec,
    ]
    for kind in kinds:
        found += [x for x in changed_methods(kind) if x.split()[0] not in called_by_us]
    hooks = {
        connector.DMSConnector: [
            "bind_kv_cache_manager",
            "build_connector_meta",
            "update_connector_output",
            "register_kv_caches",
            "bind_connector_metadata",
            "build_connector_worker_meta",
            "requires_piecewise_for_cudagraph",
        ],
        scheduling.DMSManager: [
            "get_num_blocks_to_allocate",
            "allocate_new_blocks",
            "pop_blocks_for_free",
            "find_longest_cache_hit",
        ],
        scheduling.DMSSpec: ["prefix_cacheable", "max_memory_usage_bytes", "merge"],
        model.GatedBase: ["_create_attention_instances", "_get_attn_cls", "load_weights"],
        attention.DMSBackend: ["supported_kv_cache_layouts", "get_supported_kernel_block_sizes"],
    }
    for kind, names in hooks.items():
        found += overriding(kind, names)
    used = {
        "parsers by format": "hf" in parsers._CONFIG_FORMAT_TO_CONFIG_PARSER,
        "settings by architecture": isinstance(MODELS_CONFIG_MAP, dict),
        "layout BLHNC": hasattr(KVCacheLayout, "BLHNC"),
        "BlockPool.get_new_blocks": hasattr(BlockPool, "get_new_blocks"),
        "BlockPool.free_blocks": hasattr(BlockPool, "free_blocks"),
        "ops that graphs are cut at": "vllm::unified_attention_with_output"
        in CompilationConfig._attention_ops,
        "VllmConfig.use_v2_model_runner": hasattr(VllmConfig, "use_v2_model_runner"),
        "managers of a coordinator": "single_type_managers"
        in inspect.getsource(KVCacheCoordinator.__init__),
    }
    return found + [f"{name} is not there" for name, there in used.items() if not there]


if __name__ == "__main__":
    json.dump(report(), sys.stdout)
