# SPDX-License-Identifier: Apache-2.0
"""Presses of kvpress on prompts given as token ids: rows as JSON, one a line. Nothing of ours is imported.

    .venv-kvpress/bin/python benchmarks/kvpress_peer.py JOB.json      (real_models.py writes jobs, and reads the rows)

kvpress needs a transformers that is not ours, hence a process of its own (`make .venv-kvpress/.ready`). Its presses are
unmodified: each gets, layer by layer, what its own hook would give it in the forward of a context, and says what stays.
As that forward is the same for all presses and ratios, it runs once a prompt. Questions and continuations then are read
on what each kept, or answers written; nothing is evicted afterwards, unless a press does that itself.

    KeyDiff                     cuts a context to so many tokens, the same in every head
    AdaKV(ExpectedAttention)    the same by layer, heads share unequally: it masks, and frees nothing
    Decoding(KeyDiff)           cuts the context, and cuts back to as many tokens every 16 steps while it writes
    QuantizedCache(4)           transformers' own cache with quanto's 4 bits: evicts nothing
"""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import kvpress
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import QuantizedCache
from transformers.utils import logging as hf_logging

Key = tuple[str, float]  # method, ratio
FULL = "none"  # the method that keeps all
INTERVAL = 16  # steps between two cuts of a press that works while it writes


@dataclass
class Held:
    """A method, and what it holds of a context.

    Attributes:
        cache: of the context.
        press: cuts the context; None keeps it.
        decoding: cuts while an answer is written; None does not.
        masked: of a press that masks instead of cutting: what kvpress' attention leaves out, by layer.
    """

    cache: Any
    press: Any = None
    decoding: Any = None
    masked: dict[int, Any] = field(default_factory=dict)


class Together(kvpress.BasePress):
    """Asks several methods in one forward, and evicts nothing itself."""

    def __init__(self, methods: list[Held]) -> None:
        self.methods = methods

    def post_init_from_model(self, model: Any) -> None:
        """As every press."""
        for press in (x for held in self.methods for x in (held.press, held.decoding) if x):
            press.post_init_from_model(model)

    def compress(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        """What each method keeps of a layer goes to its own cache."""
        for held in self.methods:
            module.masked_key_indices = None
            kept = (keys, values)
            if held.press is not None:
                kept = held.press.compress(module, hidden_states, keys, values, *rest)
            held.cache.update(*kept, module.layer_idx)
            held.masked[module.layer_idx] = module.masked_key_indices
        module.masked_key_indices = None
        return keys, values


def method(name: str, kept: int, length: int, config: Any) -> Held:
    """A method that keeps exactly so many tokens of a context; presses round what they are told downwards."""
    kind, _, of = name.rstrip(")").partition("(")
    if kind == "QuantizedCache":
        return Held(QuantizedCache("quanto", config, nbits=int(of)))

    def scorer(ratio: float) -> Any:
        return getattr(kvpress, f"{of or kind}Press")(compression_ratio=ratio)

    held = Held(DynamicCache(), scorer(1 - (kept + 0.5) / length))
    if kind == "AdaKV":
        held.press = kvpress.AdaKVPress(held.press)
    elif kind == "Decoding":
        held.decoding = kvpress.DecodingPress(scorer(0.0), INTERVAL, target_size=kept)
    elif of:
        raise SystemExit(f"{name} is none of the methods that this script knows")
    return held


@torch.no_grad()
def read(model: Any, prompt: dict[str, Any], wanted: list[Key]) -> dict[Key, Held]:
    """What every method keeps of a context [T], and the full cache."""
    context = torch.tensor([prompt["context"]])
    length = context.shape[1]
    methods = {
        (name, ratio): method(name, prompt["kept"][str(ratio)], length, model.config)
        for name, ratio in wanted
    }
    full = DynamicCache()
    with Together([*methods.values()])(model):
        out = model(input_ids=context, past_key_values=full, use_cache=True, logits_to_keep=1)
    prompt["last"] = out.logits[0].argmax(-1)
    for (_, ratio), held in methods.items():
        if held.press is not None:
            assert tokens_of(held) == prompt["kept"][str(ratio)]
    return {(FULL, 1.0): Held(full), **methods}


def tokens_of(held: Held) -> float:
    """Tokens that a head holds, mean over heads and layers; those that are masked do not count."""
    seen = held.cache.get_seq_length()
    heads = [len(x.keys[0]) for x in held.cache.layers]
    masked = sum(len(x[0]) for x in held.masked.values() if x is not None)
    return seen - masked / sum(heads)


def bytes_of(held: Held) -> int:
    """Bytes of keys and values, scales included, masked ones too."""
    found = 0
    for layer in held.cache.layers:
        packed = [getattr(layer, f"_quantized_{x}", None) for x in ("keys", "values")]
        tensors = [layer.keys, layer.values]
        tensors += [y for x in packed if x is not None for y in (x._data._data, x._scale, x._shift)]
        found += sum(x.numel() * x.element_size() for x in tensors)
    return found


@torch.no_grad()
def continue_on(model: Any, held: Held, ids: list[int], start: int) -> Tensor:
    """Logits [N, V] of N tokens that follow a context of `start` tokens."""
    layers = [x.self_attn for x in model.model.layers]
    # kvpress masks with keys that no query reads, and finds none for many queries at once.
    masks = any(x is not None for x in held.masked.values())
    logits = []
    for part in ([x] for x in ids) if masks else [ids]:
        positions = torch.arange(start, start + len(part))[None]
        for layer in layers:
            layer.masked_key_indices = held.masked.get(layer.layer_idx)
        given = {"past_key_values": held.cache, "position_ids": positions, "use_cache": True}
        logits.append(model(input_ids=torch.tensor([part]), **given).logits[0])
        start += len(part)
    for layer in layers:
        layer.masked_key_indices = None
    return torch.cat(logits)


def write_on(model: Any, held: Held, prompt: dict[str, Any], start: int) -> list[int]:
    """What greedy decoding writes after a question, at most prompt["tokens"] ids, without the one that ends it."""
    fed, written = prompt["prompt"], list[int]()
    with nullcontext() if held.decoding is None else held.decoding(model):
        while len(written) < prompt["tokens"]:
            token = int(continue_on(model, held, fed, start)[-1].argmax())
            if token in prompt["stop"]:
                break
            written.append(token)
            start, fed = start + len(fed), [token]
    return written


def right_answers(logits: Tensor, last: Tensor, turns: list[list[list[int]]]) -> tuple[int, int]:
    """How many answers are the arg-max given what came before, and how many there are."""
    predicted = torch.cat([last, logits.argmax(-1)]).tolist()  # predicted[t] is said before token t
    right = position = 0
    for asked, answer in turns:
        start = position + len(asked)
        position = start + len(answer)
        right += predicted[start:position] == answer
    return right, len(turns)


def measure(model: Any, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one task, by method and ratio."""
    wanted = [(name, float(ratio)) for name, ratio in task["wanted"]]
    keys = [(FULL, 1.0), *wanted]
    right = dict.fromkeys(keys, 0)
    asked = 0
    kl: dict[Key, list[Tensor]] = {key: [] for key in keys}
    same: dict[Key, list[Tensor]] = {key: [] for key in keys}
    written: dict[Key, list[list[int]]] = {key: [] for key in keys}
    size = dict.fromkeys(keys, 0)
    resident: dict[Key, list[float]] = {key: [] for key in keys}
    begin = time.perf_counter()
    for prompt in task["prompts"]:
        start = len(prompt["context"])
        reference = None
        for key, held in read(model, prompt, wanted).items():
            size[key] += bytes_of(held)
            if "prompt" in prompt:
                written[key].append(write_on(model, held, prompt, start))
                resident[key].append(tokens_of(held))
                continue
            if "turns" in prompt:
                ids = [token for turn in prompt["turns"] for part in turn for token in part]
                logits = continue_on(model, held, ids, start)
                hits, count = right_answers(logits, prompt["last"], prompt["turns"])
                right[key] += hits
                continue
            logits = continue_on(model, held, prompt["tail"], start).float().log_softmax(-1)
            reference = logits if reference is None else reference  # the full cache comes first
            distance = F.kl_div(logits, reference, reduction="none", log_target=True).sum(-1)
            kl[key].append(distance.clamp(min=0.0))
            same[key].append(logits.argmax(-1) == reference.argmax(-1))
        asked += len(prompt.get("turns", ()))
    rows = []
    for key in keys:
        row: dict[str, Any] = {"press": key[0], "ratio": key[1], "kvpress": kvpress_version()}
        row["bytes_ratio"] = size[FULL, 1.0] / size[key]
        row["seconds"] = round(time.perf_counter() - begin, 1)
        if written[key]:
            row["written"] = written[key]
            # At the end of an answer, of a head, mean over heads, layers and prompts.
            row["resident"] = sum(resident[key]) / len(resident[key])
        elif asked:
            row |= {"right": right[key], "asked": asked}
        else:
            values = torch.cat(kl[key]).double()
            row |= {"tail_kl": values.mean().item(), "tail_kl_p99": values.quantile(0.99).item()}
            row |= {"tail_top1": torch.cat(same[key]).double().mean().item(), "tail": len(values)}
        rows.append(row)
    return rows


def kvpress_version() -> str:
    """Of the package that is measured."""
    from importlib.metadata import version

    return f"{version('kvpress')}, transformers {version('transformers')}"


def main() -> None:
    """Read the job, print its rows task by task."""
    with open(sys.argv[1]) as file:
        job = json.load(file)
    hf_logging.disable_progress_bar()
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
    for number, task in enumerate(job["tasks"]):
        for row in measure(model, task):
            print(json.dumps({"number": number, **row}), flush=True)


if __name__ == "__main__":
    main()
