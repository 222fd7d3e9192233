# SPDX-License-Identifier: Apache-2.0
"""What vLLM must be set to for the device that it runs on, or an error that names what does not run there."""

import os
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

from modelopt_dms.kernels.dispatch import NEEDED_GPU, kernels_fit, rows_fit
from modelopt_dms.serving.vllm.names import ATTENTION_OP, LOG

logger = init_logger(LOG)


def settle_platform(vllm_config: VllmConfig) -> None:
    """Refuse what does not run on this device, and set the rest.

    Raises:
        ValueError: the device, its model or a setting, with what is accepted.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        _refuse_gpu(vllm_config, current_platform)
        _cut_graphs(vllm_config)
    elif not current_platform.is_cpu():
        raise ValueError(
            f"DMS models are served by vLLM on CPUs and on NVIDIA GPUs, not on {current_platform._enum.name}"
        )
    _take_model_runner_v1(vllm_config)
    if vllm_config.scheduler_config.async_scheduling:
        logger.info(
            "Asynchronous scheduling is off: slabs grow and shrink by what the step before has evicted."
        )
    vllm_config.scheduler_config.async_scheduling = False


def _take_model_runner_v1(vllm_config: VllmConfig) -> None:
    """Model Runner V2 warms up with its KV connector off, which is where slabs are; and only V1 has run a DMS model.

    Raises:
        ValueError: V2 was asked for, or something that needs it.
    """
    if _is_on("VLLM_USE_V2_MODEL_RUNNER"):
        raise ValueError(
            "VLLM_USE_V2_MODEL_RUNNER=1: DMS models are served with Model Runner V1 only; unset it"
        )
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0":
        logger.info(
            "Taking Model Runner V1 (VLLM_USE_V2_MODEL_RUNNER=0): V2 cannot serve DMS models."
        )
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # which workers inherit
    if vllm_config.use_v2_model_runner:
        raise ValueError(
            "something that was asked for needs Model Runner V2 (watermarking, HiSparse), or an engine in this process "
            "has; DMS models are served with V1 only: leave that out, or start anew with VLLM_USE_V2_MODEL_RUNNER=0"
        )


def _is_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def _refuse_gpu(vllm_config: VllmConfig, platform: Any) -> None:
    """Raise ValueError where kernels cannot run."""
    found = platform.get_device_capability()
    capability = (0, 0) if found is None else (int(found[0]), int(found[1]))
    if not kernels_fit(capability):
        raise ValueError(
            f"DMS models need {NEEDED_GPU} on vLLM, and {platform.get_device_name()} has "
            f"{'.'.join(map(str, capability))}; modelopt_dms.load and generate run there, slower"
        )
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    dim, dtype = model.get_head_size(), model.dtype
    if not rows_fit(dim, group, dtype):
        raise ValueError(
            f"head_dim={dim} with {group} query heads for each KV head in {str(dtype).removeprefix('torch.')} is not "
            "served on GPUs; accepted: multiples of 8 up to 128, and up to 256 with at most 32 such heads in 16 bits"
        )


def _cut_graphs(vllm_config: VllmConfig) -> None:
    """Keep our op out of compiled graphs and CUDA graphs: what it does depends on numbers of the step.

    Full CUDA graphs are switched off by `DMSConnector.requires_piecewise_for_cudagraph`.

    Raises:
        ValueError: graphs are to be cut otherwise.
    """
    if _is_on("VLLM_USE_BREAKABLE_CUDAGRAPH"):
        raise ValueError(
            "VLLM_USE_BREAKABLE_CUDAGRAPH=1 would capture the attention of a DMS model in a CUDA graph; unset it"
        )
    os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "0"  # vLLM may switch it on later
    compilation = vllm_config.compilation_config
    # Where there are none, vLLM would take its own attention only; without those, it would make no graphs at all.
    own = ["vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update"]
    given = compilation.splitting_ops or [*compilation._attention_ops, *own]
    compilation.splitting_ops = list(dict.fromkeys([*given, ATTENTION_OP]))
    # Fusing the quantization of outputs with attention would need vLLM's own attention.
    compilation.pass_config.fuse_attn_quant = False
