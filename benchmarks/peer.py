# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's experimental/dms on the same shape: one row as JSON on the last line. Its code is never in our tree.

    PYTHONPATH=<site with its transformers> python benchmarks/peer.py <checkout>/experimental/dms qwen3-8b 32768 16 8

Needs CUDA, `flash_attn` (flash_attn_with_kvcache), and the transformers that its pyproject.toml pins (4.57.3), which is
not ours: hence a process of its own. Knows Qwen3 only. Random weights; the gate borrows a query dimension, and its
offset is searched until the ratio after a short prompt is the wanted one. There is no way into its cache, so the
context is a real prefill, read in chunks.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch

CHUNK = 2048
WARMUP, STEPS = 8, 32
WINDOW = 256
# qwen3-8b, as end_to_end.py has it
SIZES: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


def make(checkout: str) -> Any:
    """Its model with random weights on the GPU."""
    sys.path.insert(0, checkout)
    from models.qwen3.configuration_qwen3_dms import Qwen3ConfigDMS  # type: ignore[import-not-found]
    from models.qwen3.modeling_qwen3_dms import Qwen3ForCausalLMDMS  # type: ignore[import-not-found]

    # Its window has to exceed its page.
    config = Qwen3ConfigDMS(
        **SIZES,
        dms_window_size=WINDOW,
        dms_paged_attention_block_size=WINDOW // 2,
        dms_chunked_prefill=CHUNK,
        use_cache=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3ForCausalLMDMS(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def fed(model: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Its cache after a prompt, and the next tokens."""
    cache = model.get_cache(preallocate_for_tokens=ids.shape[1])
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, out.logits[:, -1:].argmax(-1)


def set_ratio(model: Any, cr: float, length: int) -> float:
    """Move the offset of all gates until a prompt of this length is compressed so; the ratio found."""
    layers = [x.self_attn for x in model.model.layers]
    ids = torch.randint(SIZES["vocab_size"], (1, length), device="cuda")
    low, high, found = -500.0, 500.0, 0.0
    for _ in range(12):
        offset = (low + high) / 2
        for layer in layers:
            layer.dms_initial_alpha_offset = offset
        cache, token = fed(model, ids)
        # The ratio is that of the paged cache, which exists once a token was generated.
        model(token, past_key_values=cache, use_cache=True)
        found = cache.get_cr()
        low, high = (offset, high) if found > cr else (low, offset)
    return found


@torch.no_grad()
def measure(checkout: str, shape: str, context: int, batch: int, cr: float) -> dict[str, Any]:
    """The row."""
    if shape != "qwen3-8b":
        raise SystemExit(f"experimental/dms knows Qwen3 only, got {shape!r}")
    if not torch.cuda.is_available():
        raise SystemExit("experimental/dms needs a CUDA device with flash_attn")
    torch.manual_seed(0)
    model = make(checkout)
    set_ratio(model, cr, min(context, 8192))
    ids = torch.randint(SIZES["vocab_size"], (batch, context), device="cuda")
    cache, token = fed(model, ids)
    for step in range(WARMUP + STEPS):
        if step == WARMUP:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    ms = 1e3 * (time.perf_counter() - begin) / STEPS
    return {
        "impl": "peer",
        "format": "bf16",
        "context": context,
        "batch": batch,
        "cr": cache.get_cr(),
        "ms_per_step": ms,
        "tokens_per_s": 1e3 * batch / ms,
        "resident_tokens": context / cache.get_cr(),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout")
    parser.add_argument("shape")
    parser.add_argument("context", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("cr", type=float)
    args = parser.parse_args()
    row = measure(args.checkout, args.shape, args.context, args.batch, args.cr)
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
