# SPDX-License-Identifier: Apache-2.0
"""Jobs for `vllm_driver`, models for them, and what they should give.

vLLM has another interpreter; the oracle runs here.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from families import greedy_without_cache, open_gates, tokens
from paths import EMBEDDED
from transformers import AutoModelForCausalLM, PreTrainedModel

from modelopt_dms.modeling.mode import apply_dms
from modelopt_dms.quantization.apply import quantize

PYTHON = "MODELOPT_DMS_VLLM_PYTHON"  # in the environment: vLLM's interpreter
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
FP8_CAST = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {
            "quantizer_name": "*[kv]_bmm_quantizer",
            "cfg": {"num_bits": (4, 3), "use_constant_amax": True},
        },
    ],
    "algorithm": "max",
}


def embedded_model(fraction: float, place: Path) -> PreTrainedModel:
    """The model of this repository with gates that mark this fraction of random tokens, saved."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    apply_dms(model, {"window": 16, "target_cr": 4.0, "protect_first": 2})
    open_gates(model, fraction=fraction)
    model.save_pretrained(place)
    return model


def rounding(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that rounds keys and values as FP8 without a scale."""
    return quantize(copy.deepcopy(model), FP8_CAST)


def prompts(lengths: list[int]) -> list[list[int]]:
    return [tokens(1, n, seed=n)[0].tolist() for n in lengths]


def job(model: str, settings: dict[str, Any], lengths: list[int], new: int) -> dict[str, Any]:
    ranks = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "parallel" in str(settings) else {}
    return {
        "model": model,
        "settings": settings,
        "prompts": prompts(lengths),
        "tokens": new,
        "environment": ranks,
    }


def expected(model: PreTrainedModel, lengths: list[int], new: int) -> list[list[int]]:
    """The tokens of a full recompute, greedily."""
    with torch.no_grad():
        return [
            greedy_without_cache(model, torch.tensor([ids]), new)[0, len(ids) :].tolist()
            for ids in prompts(lengths)
        ]
