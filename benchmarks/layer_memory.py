# SPDX-License-Identifier: Apache-2.0
"""Bytes a token that one decoder layer keeps for its backward pass, for the memory budget of docs/scale.md.

    python benchmarks/layer_memory.py

Counts the tensors that autograd saves in one converted Qwen3 layer in bfloat16 at a quarter of Qwen3-32B's width,
weights apart, and multiplies by four: all of them are as wide as the layer. On a CPU, with the reference attention.
"""

import argparse
import json

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.modeling.mode import apply_dms

PART = 4  # of the full width


def saved_bytes(tokens: int) -> int:
    """Bytes saved for the backward pass of a layer, weights apart, at 1 / PART of the width."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=5120 // PART,
        intermediate_size=25600 // PART,
        num_hidden_layers=1,
        num_attention_heads=64 // PART,
        num_key_value_heads=8 // PART,
        head_dim=128,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    apply_dms(model, DMSConfig(window=256)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dms_gate." in name)
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
    held: dict[int, int] = {}

    def remember(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(tokens)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        out = model.model.layers[0](hidden, position_embeddings=rotary, position_ids=positions)
    del out
    return sum(held.values())


def main() -> None:
    """Print the bytes a token."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    for tokens in parser.parse_args().tokens:
        print(
            json.dumps({"tokens": tokens, "MB_a_token": PART * saved_bytes(tokens) / tokens / 1e6})
        )


if __name__ == "__main__":
    main()
