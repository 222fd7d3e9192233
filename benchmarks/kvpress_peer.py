# SPDX-License-Identifier: Apache-2.0
"""Presses of kvpress on prompts given as token ids: rows as JSON, one a line. Nothing of ours is imported.

    .venv-kvpress/bin/python benchmarks/kvpress_peer.py JOB.json      (real_models.py writes jobs, and reads the rows)

kvpress needs a transformers that is not ours, hence a process of its own (`make .venv-kvpress/.ready`). Its presses are
unmodified: each gets, layer by layer, what its own hook would give it in the forward of a context, and says what stays.
As that forward is the same for all presses and ratios, it runs once a prompt. Questions and continuations then are read
on what each kept, or answers written; nothing is evicted afterwards.
"""

import json
import sys
import time
from typing import Any

import kvpress
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as hf_logging

Key = tuple[str, float]  # press, ratio
FULL = "none"  # the press that evicts nothing


class Together(kvpress.BasePress):
    """Asks several presses in one forward, and evicts nothing itself."""

    def __init__(self, presses: dict[Key, Any]) -> None:
        self.presses = presses
        self.caches: dict[Key, DynamicCache] = {key: DynamicCache() for key in presses}

    def post_init_from_model(self, model: Any) -> None:
        """As every press."""
        for press in self.presses.values():
            press.post_init_from_model(model)

    def compress(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        """What each press keeps of a layer goes to its own cache."""
        for key, press in self.presses.items():
            kept = press.compress(module, hidden_states, keys, values, *rest)
            self.caches[key].update(*kept, module.layer_idx)
        return keys, values


def press_that_keeps(name: str, kept: int, length: int) -> Any:
    """A press that keeps exactly so many tokens of a context; presses round what they are told downwards."""
    return getattr(kvpress, f"{name}Press")(compression_ratio=1 - (kept + 0.5) / length)


@torch.no_grad()
def read(model: Any, prompt: dict[str, Any], wanted: list[Key]) -> dict[Key, DynamicCache]:
    """Caches of a context [T] by press and ratio, and the full one."""
    context = torch.tensor([prompt["context"]])
    length = context.shape[1]
    presses = {
        (name, ratio): press_that_keeps(name, prompt["kept"][str(ratio)], length)
        for name, ratio in wanted
    }
    together = Together(presses)
    full = DynamicCache()
    with together(model):
        out = model(input_ids=context, past_key_values=full, use_cache=True, logits_to_keep=1)
    prompt["last"] = out.logits[0].argmax(-1)
    for (_, ratio), cache in together.caches.items():
        assert cache.get_seq_length() == prompt["kept"][str(ratio)]
    return {(FULL, 1.0): full, **together.caches}


@torch.no_grad()
def continue_on(model: Any, cache: DynamicCache, ids: list[int], start: int) -> Tensor:
    """Logits [N, V] of N tokens that follow a context of `start` tokens."""
    positions = torch.arange(start, start + len(ids))[None]
    tokens = torch.tensor([ids])
    out = model(input_ids=tokens, past_key_values=cache, position_ids=positions, use_cache=True)
    return out.logits[0]


def write_on(model: Any, cache: DynamicCache, prompt: dict[str, Any], start: int) -> list[int]:
    """What greedy decoding writes after a question, at most prompt["tokens"] ids, without the one that ends it."""
    fed, written = prompt["prompt"], list[int]()
    while len(written) < prompt["tokens"]:
        token = int(continue_on(model, cache, fed, start)[-1].argmax())
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
    """Rows of one task, by press and ratio."""
    wanted = [(name, float(ratio)) for name, ratio in task["wanted"]]
    keys = [(FULL, 1.0), *wanted]
    right = dict.fromkeys(keys, 0)
    asked = 0
    kl: dict[Key, list[Tensor]] = {key: [] for key in keys}
    same: dict[Key, list[Tensor]] = {key: [] for key in keys}
    written: dict[Key, list[list[int]]] = {key: [] for key in keys}
    begin = time.perf_counter()
    for prompt in task["prompts"]:
        caches = read(model, prompt, wanted)
        start = len(prompt["context"])
        reference = None
        for key, cache in caches.items():
            if "prompt" in prompt:
                written[key].append(write_on(model, cache, prompt, start))
                continue
            if "turns" in prompt:
                ids = [token for turn in prompt["turns"] for part in turn for token in part]
                logits = continue_on(model, cache, ids, start)
                hits, count = right_answers(logits, prompt["last"], prompt["turns"])
                right[key] += hits
                continue
            logits = continue_on(model, cache, prompt["tail"], start).float().log_softmax(-1)
            reference = logits if reference is None else reference  # the full cache comes first
            distance = F.kl_div(logits, reference, reduction="none", log_target=True).sum(-1)
            kl[key].append(distance.clamp(min=0.0))
            same[key].append(logits.argmax(-1) == reference.argmax(-1))
        asked += len(prompt.get("turns", ()))
    rows = []
    for key in keys:
        row: dict[str, Any] = {"press": key[0], "ratio": key[1], "kvpress": kvpress_version()}
        row["seconds"] = round(time.perf_counter() - begin, 1)
        if written[key]:
            row["written"] = written[key]
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
