# SPDX-License-Identifier: Apache-2.0
"""The header of a .gguf file -> the fields of a config.json that a plan reads. Reads no weights, imports no torch."""

from pathlib import Path
from typing import Any

from modelopt_dms.checkpoints.gguf import AUTO_DTYPE, read_header

# llama.cpp's names of architectures, where they differ from transformers'. Mistral's files are llama's.
_KINDS = {"qwen3moe": "qwen3_moe"}
_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}


def config_of_gguf(path: Path) -> dict[str, Any]:
    """Fields of a config.json, as far as the file says them; weights count as dequantized, as all commands read them.

    Raises:
        GgufError: it cannot be read.
    """
    header = read_header(path)
    kind, known = header.architecture, header.metadata
    found = {ours: known.get(f"{kind}.{theirs}") for ours, theirs in _FIELDS.items()}
    # Arrays are read as their length.
    found["vocab_size"] = known.get(f"{kind}.vocab_size") or known.get("tokenizer.ggml.tokens")
    if kind == "llama":
        # Its heads are rotated whole; other architectures may rotate a part.
        found["head_dim"] = found["head_dim"] or known.get("llama.rope.dimension_count")
    found = {name: value for name, value in found.items() if value}
    if kind == "llama" and "num_experts" in found:
        kind = "mixtral"
    return found | {
        "model_type": _KINDS.get(kind, kind),
        "dtype": AUTO_DTYPE,
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
