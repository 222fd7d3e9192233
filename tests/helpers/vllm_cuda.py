# SPDX-License-Identifier: Apache-2.0
"""What vLLM settles on for a DMS model on a CUDA device that is not there. A script for vLLM's own interpreter.

vLLM's platform is a double that says what an H100 would; everything else is vLLM's own code, up to where it would load
the model. Reads a JSON list of jobs from the file that it is called with, and writes a list of results to the second:

    job     {"model": DIR, "settings": {...of vllm.EngineArgs...}, "platform": {"capability": [9, 0], "name": text,
            "kind": "CUDA"}, "environment": {}}
    result  what is asked below, or {"error": text}
"""

import json
import os
import sys
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "modelopt_dms"})

import torch
import vllm.platforms
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum


class Double(Platform):
    """A GPU, as far as vLLM asks before it uses one."""

    _enum = PlatformEnum.CUDA
    device_name = device_type = "cuda"
    dispatch_key = "CUDA"
    dist_backend = "nccl"
    ray_device_key = "GPU"
    device_control_env_var = "CUDA_VISIBLE_DEVICES"
    simple_compile_backend = "inductor"
    supported_quantization: list[str] = []
    capability: tuple[int, int] = (9, 0)
    name = "NVIDIA H100 80GB HBM3"

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(*cls.capability)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return cls.name

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 << 30

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        return True

    @classmethod
    def opaque_attention_op(cls) -> bool:
        return True

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    @classmethod
    def device_count(cls) -> int:
        return 1

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = "vllm.v1.worker.gpu_worker.Worker"


def pretend() -> None:
    """Let all of vLLM have the double. What it is built with is imported before: kernels for CUDA are not there."""
    from vllm.engine import arg_utils  # noqa: F401
    from vllm.model_executor.models import transformers  # noqa: F401

    from modelopt_dms.serving.vllm import model  # noqa: F401

    double, real = Double(), vllm.platforms.current_platform
    vllm.platforms._current_platform = double
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("current_platform") is real:
            module.current_platform = double  # type: ignore[attr-defined]


def settled(job: dict[str, Any]) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs

    said = job.get("platform", {})
    Double.capability = tuple(said.get("capability", (9, 0)))
    Double.name = said.get("name", Double.name)
    Double._enum = PlatformEnum[said.get("kind", "CUDA")]
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_USE_BREAKABLE_CUDAGRAPH"):
        os.environ.pop(name, None)
    os.environ.update(job.get("environment", {}))
    try:
        settings = {"max_model_len": 200, "skip_tokenizer_init": True, **job["settings"]}
        config = EngineArgs(model=job["model"], **settings).create_engine_config()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return report(config)


def report(config: Any) -> dict[str, Any]:
    """Of settings that vLLM has finished."""
    from vllm.compilation.partition_rules import should_split
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    from modelopt_dms.serving.vllm.attention import DMSMetadataBuilder

    compilation = config.compilation_config
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.vllm.modelopt_dms_attention.default, ())
    mode = compilation.cudagraph_mode.name
    support = DMSMetadataBuilder.get_cudagraph_support(config, None)
    resolved = compilation.resolve_cudagraph_mode_and_sizes(support, "DMSBackend")
    CudagraphDispatcher(config).initialize_cudagraph_keys(resolved, 1)
    return {
        "cudagraph_mode": mode,
        "resolved": resolved.name,
        "mode": compilation.mode.name,
        "split": should_split(node, compilation.splitting_ops or []),
        "others": "vllm::unified_attention_with_output" in (compilation.splitting_ops or []),
        "v2": config.use_v2_model_runner,
        "environment": os.environ.get("VLLM_USE_V2_MODEL_RUNNER"),
        "async": config.scheduler_config.async_scheduling,
        "connector": config.kv_transfer_config.kv_connector,
        "warm_up": warm_up(),
    }


def warm_up() -> float:
    """What attention gives to requests that vLLM makes up, of blocks that nobody has."""
    from modelopt_dms.serving.vllm.attention import DMSImpl, DMSMetadata

    out = torch.full((5, 2, 16), torch.nan)
    impl: Any = DMSImpl(2, 16, 1.0, 1)
    impl.forward("no layer", None, DMSMetadata([0, 4, 5], [0, 0]), out)
    return out.abs().max().item()


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    pretend()
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump([settled(x) for x in jobs], file)
