# SPDX-License-Identifier: Apache-2.0
"""Many decode steps of random crops, forks, reorderings and restarts on one cache: is it right, and is memory flat?

    python tools/soak.py --steps 100000

Every 25 steps the cache checks itself (`check_integrity`); every 250 its next logits are compared with those of a cache
that reads the whole text anew. Resident memory is printed as it goes.
"""

import argparse
import copy
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import modelopt_dms as dms

LONGEST = 300
CLOSE = 1e-4


def make(seed: int) -> Any:
    """A tiny model whose gates mark about half of the tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model = dms.apply_dms(
        LlamaForCausalLM(config).eval(), dms.DMSConfig(window=32, scale=1.0, offset=0.0)
    )
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "dms_gate" in name:
                x.copy_(torch.randn_like(x))
    return model


def memory() -> float:
    """Resident megabytes of this process now."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def check(cache: Any) -> None:
    """Raise if a layer's slots are shared or lost."""
    for layer in cache.layers:
        layer.slots.check_integrity()


@torch.no_grad()
def run(steps: int, seed: int, report: Any = print) -> tuple[float, list[float]]:
    """Largest difference of a logit, and memory at ten moments."""
    rng, model = random.Random(seed), make(seed)
    cache: Any = None
    batch, done = 2, 0
    text = torch.zeros(batch, 0, dtype=torch.long)
    worst, held = 0.0, []
    acts = dict.fromkeys(("decode", "chunk", "crop", "fork", "reorder", "restart", "refused"), 0)
    while done < steps:
        act = rng.choices([*acts][:6], (80, 6, 6, 3, 4, 1))[0]
        if text.shape[1] >= LONGEST or cache is None:
            act = "restart"
        acts[act] += 1
        if act == "restart":
            cache, text = None, torch.zeros(batch, 0, dtype=torch.long)
        elif act == "crop":
            back = min(rng.randint(1, 20), text.shape[1] - 1)
            try:
                cache.crop(-back)
                text = text[:, : text.shape[1] - back]
            except ValueError:
                # Only the last 24 tokens can always be taken back; a refusal changes nothing.
                acts["refused"] += 1
        elif act == "fork":
            # The copy goes on; what the other takes in must not show in it.
            copied = copy.deepcopy(cache)
            model(torch.randint(2, 64, (batch, 3)), past_key_values=cache)
            cache = copied
        elif act == "reorder":
            order = torch.tensor([rng.randrange(batch) for _ in range(batch)])
            cache.reorder_cache(order)
            text = text[order]
        tokens = rng.randint(2, 40) if act in ("restart", "chunk") else 1
        new = torch.randint(2, 64, (batch, tokens))
        out = model(new, past_key_values=cache, use_cache=True)
        cache, text, done = out.past_key_values, torch.cat([text, new], 1), done + 1
        if done % 25 == 0:
            check(cache)
        if done % 250 == 0:
            whole = model(text, use_cache=True).logits[:, -1]
            worst = max(worst, float((whole - out.logits[:, -1]).abs().max()))
        if done % max(1, steps // 10) == 0:
            held.append(memory())
            report(f"{done} steps: {held[-1]:.1f} MB resident, largest difference {worst:.1e}")
    report(f"{acts}")
    return worst, held


def main() -> None:
    """Run, print what was found; exit 1 if logits differ or memory grew by more than a tenth after the first tenth."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    worst, held = run(options.steps, options.seed)
    print(
        f"{options.steps} steps in {time.perf_counter() - start:.0f} s, {held[0]:.1f} to {held[-1]:.1f} MB"
    )
    sys.exit(int(worst > CLOSE or held[-1] > 1.1 * held[0]))


if __name__ == "__main__":
    main()
