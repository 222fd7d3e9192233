# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every supported family, built in memory, and gates that evict half of the tokens."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from paths import ROOT
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from modelopt_dms.gates.gate import eviction_off
from modelopt_dms.modeling.convert import dms_modules
from modelopt_dms.modeling.mode import apply_dms

VOCABULARY = 64
SLIDING_WINDOW = 6
WINDOW = 5
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


# What all families share; 4 query heads on 2 KV heads.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Large enough for attention to prefer some tokens: evicting them must show in the logits.
    "initializer_range": 0.1,
    **SPECIAL_TOKENS,
}


def _decoder(name: str, **fields: Any) -> Callable[[], PreTrainedConfig]:
    """A config class of transformers with these sizes."""

    def build() -> PreTrainedConfig:
        return getattr(transformers, name)(**{**SIZES, "attention_dropout": 0.0, **fields})

    return build


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_HYBRID = {
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,  # transformers: the part of a head that is rotated
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _decoder("LlamaConfig"),
    "qwen2": _decoder("Qwen2Config"),
    "qwen3": _decoder("Qwen3Config"),
    "qwen3_moe": _decoder("Qwen3MoeConfig", **_EXPERTS),
    "mistral": _decoder("MistralConfig", sliding_window=None),
    "mixtral": _decoder("MixtralConfig", num_local_experts=4, sliding_window=None),
    "gemma2": _decoder(
        "Gemma2Config", query_pre_attn_scalar=8, attn_logit_softcapping=2.0, **_HYBRID
    ),
    "gemma3": _decoder("Gemma3TextConfig", query_pre_attn_scalar=8, **_HYBRID),
    "phi3": _decoder("Phi3Config"),
    "olmo2": _decoder("Olmo2Config"),
    "granite": _decoder("GraniteConfig", attention_multiplier=0.3),
    "gpt_neox": _decoder("GPTNeoXConfig"),
    "gpt_oss": _decoder(
        "GptOssConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **_HYBRID,
    ),
    "deepseek_v2": _decoder(
        "DeepseekV2Config", **_LATENT, q_lora_rank=None, topk_method="greedy", n_group=1
    ),
    "deepseek_v3": _decoder("DeepseekV3Config", **_LATENT, q_lora_rank=16, n_group=2, topk_group=1),
}
HYBRID = ("gemma2", "gemma3", "gpt_oss")
LATENT = ("deepseek_v2", "deepseek_v3")


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with random weights, biases and norms included, and greedy generation without an end token."""
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.generation_config.update(**SPECIAL_TOKENS, do_sample=False)
    return model.eval()


def build_dms(family: str, seed: int = 0, base: Any = None, **facts: Any) -> PreTrainedModel:
    """A converted model whose gates mark about half of the tokens of every head.

    Args:
        family: key of FAMILIES.
        seed: of all weights.
        base: changes to the base model's config.
        facts: fields of DMSConfig.
    """
    model = build(family, seed, **(base or {}))
    apply_dms(model, {"window": WINDOW, "scale": 10.0, **facts})
    return open_gates(model, seed)


def open_gates(model: PreTrainedModel, seed: int = 0, fraction: float = 0.5) -> PreTrainedModel:
    """Give gates random weights, and thresholds that a `fraction` of random tokens exceeds."""
    generator = torch.Generator().manual_seed(seed)
    hidden: dict[nn.Module, Tensor] = {}

    def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden[module] = module.dms_gate.read(args, kwargs)

    modules = dms_modules(model).values()
    hooks = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in modules]
    with torch.no_grad(), eviction_off(model):
        model(tokens(4, 64, seed=seed + 1), use_cache=False)
    for hook in hooks:
        hook.remove()
    for module in modules:
        gate = module.dms_gate
        if "weight" in gate._parameters:
            gate.weight.data.normal_(std=0.1, generator=generator)
        z = gate.logits(hidden[module]).detach()  # [B, K, T]
        rows = z.transpose(0, 1).flatten(1) if len(gate.threshold) > 1 else z.flatten()[None]
        gate.threshold.copy_(torch.stack([_gap_near(row, 1 - fraction) for row in rows]))
    return model


def _gap_near(values: Tensor, quantile: float) -> Tensor:
    """The middle of the widest gap near a quantile, so that rounding cannot flip a decision."""
    values = values.sort().values
    start = int(len(values) * max(0.0, quantile - 0.05))
    middle = values[start : int(len(values) * (quantile + 0.05)) + 2]
    widest = middle.diff().argmax()
    return middle[widest : widest + 2].mean()


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest number of b where that exceeds 1."""
    assert a.shape == b.shape
    return (a - b).abs().max().item() / max(1.0, b.abs().max().item())


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [batch, length], special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def eager_copy(model: PreTrainedModel) -> PreTrainedModel:
    """An independent copy that runs transformers' own eager attention."""
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    return copied


def feed(
    model: PreTrainedModel, ids: Tensor, sizes: list[int], cache: Any = None
) -> tuple[Tensor, Any]:
    """Logits [B, T, V] of ids [B, T] fed in chunks of these sizes, and the cache."""
    assert sum(sizes) == ids.shape[1]
    logits = []
    for chunk in ids.split(sizes, dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


def greedy_without_cache(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Tensor:
    """Greedy continuation [B, T + new_tokens], every step recomputed from the whole sequence."""
    for _ in range(new_tokens):
        logits = model(ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


@contextmanager
def frozen_base(model: PreTrainedModel) -> Iterator[list[nn.Parameter]]:
    """Inside, only the gates learn; gives their parameters. Gradients are dropped afterwards."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dms_gate." in name)
    try:
        yield [x for x in model.parameters() if x.requires_grad]
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None


def results_in_a_fresh_process(code: str, places: Iterable[Path]) -> dict[str, Any]:
    """What a script, given these paths, prints as lines "RESULT [name, value]"."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, places)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [x.removeprefix("RESULT ") for x in result.stdout.splitlines() if "RESULT " in x]
    return dict(json.loads(line) for line in lines)
