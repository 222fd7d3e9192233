# SPDX-License-Identifier: Apache-2.0
"""`generate` of DMS models against an implementation of its own in float64: no cache, no kernels, nothing of ours.

    python tools/differential.py --cases 500

A case is a random tiny Llama or Qwen3 with random gates, a left-padded batch and greedy decoding. The reference reads
each finished text once, with the mask that the definition gives: a query t reads key s if s <= t, and s is not marked
or t - s <= window. Every logit that `generate` gave on its way must be the same.
"""

import argparse
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import modelopt_dms as dms

# Logits of float32 models, whose size is about 1.
CLOSE = 1e-4
# Logits of gates that are nearer to the threshold than this may round to the other side.
NEAR = 1e-4


@dataclass(frozen=True)
class Gates:
    """What decides, as plain numbers: weights [R, C] and thresholds [R] of every layer."""

    weights: list[Tensor]
    thresholds: list[Tensor]
    scale: float
    offset: float
    window: int
    shift: int
    protect: int


def reference(model: Any, gates: Gates, ids: Tensor) -> tuple[Tensor, float]:
    """Logits [T, V] of a text [T] in float64, and how near a gate came to its threshold."""
    config = model.config
    weights = {name: x.double() for name, x in model.state_dict().items()}
    T, D = len(ids), config.head_dim
    x = weights["model.embed_tokens.weight"][ids]
    position = torch.arange(T, dtype=torch.float64)
    theta = config.rope_parameters["rope_theta"]
    angles = position[:, None] / theta ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
    cos, sin = (f(angles).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))
    distance = position[:, None] - position[None]
    nearest = float("inf")

    def norm(h: Tensor, weight: Tensor) -> Tensor:
        return h * (h.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weight

    def turn(h: Tensor) -> Tensor:
        half = torch.cat([-h[..., D // 2 :], h[..., : D // 2]], -1)
        return h * cos + half * sin

    for layer in range(config.num_hidden_layers):
        w = {k.split(f"layers.{layer}.")[1]: v for k, v in weights.items() if f".{layer}." in k}
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, D)) for name in "qkv"
        )
        if "self_attn.q_norm.weight" in w:
            q, k = norm(q, w["self_attn.q_norm.weight"]), norm(k, w["self_attn.k_norm.weight"])
        q, k = turn(q), turn(k)
        z = gates.scale * (h @ gates.weights[layer].T) - gates.offset - gates.thresholds[layer]
        nearest = min(nearest, float(z.abs().min()))
        marked = (z > 0) & (position >= gates.protect + gates.shift)[:, None]  # [T, R]
        if gates.shift:
            marked = torch.cat([marked[1:], torch.zeros_like(marked[:1])])
        group = q.shape[1] // k.shape[1]
        out = []
        for head in range(q.shape[1]):
            gone = marked[:, (head // group) if marked.shape[1] > 1 else 0]
            hidden = (distance < 0) | (gone[None] & (distance > gates.window))
            scores = q[:, head] @ k[:, head // group].T / D**0.5
            out.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, head // group])
        x = x + torch.cat(out, -1) @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(h @ w["mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T, nearest


def make(rng: random.Random) -> tuple[Any, Gates, Any]:
    """A plain model, the gates that it will have, and the same model with these gates."""
    kind, made = rng.choice([(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
    kv_heads = rng.choice([1, 2])
    config = kind(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=rng.randint(1, 3),
        num_attention_heads=kv_heads * rng.choice([1, 2, 4]),
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([8, 16]),
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    )
    plain = made(config).eval()
    settings = dms.DMSConfig(
        window=rng.randint(1, 12),
        decision_shift=rng.choice([0, 1]),
        protect_first=rng.choice([0, 0, 1, 4]),
        granularity=rng.choice(["head", "layer"]),
        scale=rng.choice([1.0, 100.0]),
        offset=rng.choice([0.0, 5.0]),
    )
    model = made(config).eval()
    model.load_state_dict(plain.state_dict())
    model = dms.apply_dms(model, settings)
    held = [x for x in model.modules() if type(x).__name__ == "EvictionGate"]
    with torch.no_grad():
        for gate in held:
            gate.weight.copy_(torch.randn_like(gate.weight) / settings.scale)
            gate.threshold.copy_(torch.randn_like(gate.threshold) - settings.offset)
    gates = Gates(
        [x.weight.detach().double() for x in held],
        [x.threshold.double() for x in held],
        settings.scale,
        settings.offset,
        settings.window,
        settings.decision_shift,
        settings.protect_first,
    )
    return plain, gates, model


def run(seed: int) -> tuple[float, float, float]:
    """One case: the largest difference of a logit, how near gates came to thresholds, resident over context tokens."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    plain, gates, model = make(rng)
    lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 3))]
    longest, new = max(lengths), rng.randint(1, 40)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(2, 64, (length,))
        mask[row, longest - length :] = 1
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        worst, nearest = 0.0, float("inf")
        for row, length in enumerate(lengths):
            text = found.sequences[row, longest - length :]
            logits, near = reference(plain, gates, text)
            nearest = min(nearest, near)
            steps = torch.stack([x[row] for x in found.logits]).double()
            difference = (logits[length - 1 : -1] - steps).abs().max()
            worst = max(worst, float(difference))
    held = dms.kv_stats(model)
    return worst, nearest, held.resident_tokens / held.context_tokens


def main() -> None:
    """Run all cases, print what differs and a summary; exit 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    largest, wrong, near, kept = 0.0, 0, 0, 0.0
    for seed in range(options.seed, options.seed + options.cases):
        worst, nearest, share = run(seed)
        kept += share / options.cases
        if nearest < NEAR:
            near += 1
        elif worst > CLOSE:
            wrong += 1
            print(f"seed {seed}: logits differ by {worst:.2e}", flush=True)
        else:
            largest = max(largest, worst)
    print(
        f"{options.cases} cases, {wrong} differ, {near} with a gate nearer than {NEAR:g} to its threshold (not "
        f"counted); largest difference {largest:.1e}; {100 * kept:.0f} % of tokens resident; "
        f"{time.perf_counter() - start:.0f} s"
    )
    sys.exit(min(wrong, 1))


if __name__ == "__main__":
    main()
