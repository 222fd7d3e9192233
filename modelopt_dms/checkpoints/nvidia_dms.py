# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's DMS checkpoints (Model-Optimizer, experimental/dms) -> our config and our gates, by a map of keys.

There, `config.json` names remote code and holds `dms_*`; each attention layer holds `dms_proj_alpha` [K, C] and
`dms_proj_alpha_norm` [C], and the logit of a token governs the token before it. None of their code is run.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.modeling.mode import CheckpointError, read_dms_config

MARK = "dms_window_size"
GATE_KEY = ".dms_proj_alpha"
OURS = {
    ".dms_proj_alpha.weight": ".dms_gate.weight",
    ".dms_proj_alpha_norm.weight": ".dms_gate.norm",
}


def is_nvidia(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of one of NVIDIA's DMS checkpoints."""
    return MARK in config


def read_config(config: dict[str, Any]) -> PreTrainedConfig:
    """The base model's config, of transformers' own class, with our `dms_config` in it.

    Raises:
        CheckpointError: the checkpoint keeps its decisions in query neurons, which NVIDIA reads after the query norm.
    """
    if not config.get("dms_separate_alpha", False):
        raise CheckpointError(
            "the checkpoint has dms_separate_alpha=false (decisions in query neurons); only checkpoints with separate "
            "dms_proj_alpha weights can be loaded"
        )
    theirs = {
        "gate": "residual",
        "target_cr": config.get("dms_cr", 8),
        "window": config[MARK],
        "granularity": config.get("dms_alpha_per", "head"),
        "scale": config.get("dms_alpha_scale", 100.0),
        "offset": config.get("dms_initial_alpha_offset", 5.0),
        "decision_shift": 1,
        "evict": not config.get("dms_disable_eviction", False),
    }
    dms_config = read_dms_config(theirs, "config.json, from NVIDIA's dms_* fields")
    base = {
        key: value
        for key, value in config.items()
        if not key.startswith("dms_") and key not in ("auto_map", "model_type")
    }
    return AutoConfig.for_model(config["model_type"], **base, dms_config=dms_config.model_dump())


def gate_tensors(stored: dict[str, Tensor], dms_config: DMSConfig) -> dict[str, Tensor]:
    """Our gates' tensors, by our names, from theirs."""
    rows = 1 if dms_config.granularity == "layer" else None
    gates: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        layer, separator, kind = key.partition(GATE_KEY)
        if not separator:
            continue
        if kind == ".bias":
            continue
        gates[layer + OURS[GATE_KEY + kind]] = (tensor if "norm" in kind else tensor[:rows]).float()
        if kind == ".weight":
            bias = stored.get(f"{layer}{GATE_KEY}.bias", tensor.new_zeros(len(tensor)))[:rows]
            # scale * (w . x + b) - offset > 0 is scale * (w . x) - offset > -scale * b. -0.0 would not be bit-exact.
            threshold = -dms_config.scale * bias.float()
            gates[f"{layer}.dms_gate.threshold"] = threshold + torch.zeros(())
    return gates
