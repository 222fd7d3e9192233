# SPDX-License-Identifier: Apache-2.0
"""Models with random weights, for figures that depend on shapes only."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel


def llama_config(
    layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int = 8192
) -> LlamaConfig:
    """A small Llama with PyTorch's own attention."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=32768,
    )
    config._attn_implementation = "sdpa"
    return config


def build(
    config: PreTrainedConfig, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
