# SPDX-License-Identifier: Apache-2.0
r"""How many requests a pool of vLLM holds at once, dense and DMS, and what a DMS request's blocks are for.

    .venv-vllm/bin/python benchmarks/serving_pool.py --models cr4=smollm2-cr4 cr8=smollm2-cr8 --output pool.json

A script for vLLM's interpreter: the engine runs in this process, and its scheduler is looked at twice a step, before
the workers run (what is reserved) and after they have reported (what is kept). The dense model is the first DMS model
without its gates. Requests of ragged length all come at once, and answer without end: when no more of them has been
let in for some steps, the pool is full. All numbers are exact counts: they depend on models and texts, not on the
machine.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from machine import machine, write
from serving import dense_twin

ROOT = Path(__file__).resolve().parents[1]
PAGE = 64
# The scheduler in this process, where it can be looked at.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Moment:
    """A request after a step.

    Attributes:
        context: tokens.
        dense: blocks of a cache that keeps all of them.
        rows: blocks that the resident tokens would fill without gaps.
        pages: blocks' worth of pages that hold them: every list ends with a page that is partly empty.
        reserved: blocks that were reserved for the step.
        kept: blocks that are kept after it.
    """

    context: int
    dense: int
    rows: float
    pages: float
    reserved: int
    kept: int


class Look:
    """Notes every request's moments."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, connector = scheduler, scheduler.connector
        self.ledger = connector.manager.ledger
        self.lives: dict[str, list[Moment]] = {}
        self.reserved: dict[str, int] = {}
        self.prepare, connector.build_connector_meta = connector.build_connector_meta, self.before

    def before(self, scheduler_output: Any) -> Any:
        """When a step is scheduled."""
        given = scheduler_output.num_scheduled_tokens
        self.reserved = {x: self.ledger[x].held for x in given}
        return self.prepare(scheduler_output)

    def after(self) -> None:
        """When it has been reported."""
        for request, reserved in self.reserved.items():
            if request not in self.ledger:
                continue  # finished
            entry = self.ledger[request]
            (usage,) = entry.usage.values()
            rows = usage.pages * PAGE - sum(free * lists for free, lists in usage.room)
            moment = Moment(
                entry.settled,
                -(-entry.settled // PAGE),
                round(rows / PAGE / usage.lists, 3),
                round(usage.pages / usage.lists, 3),
                reserved,
                entry.held,
            )
            self.lives.setdefault(request, []).append(moment)


def prompts(tokenizer: Any, count: int, shortest: int, longest: int) -> list[list[int]]:
    """Parts of this repository's documentation, long and short in turn."""
    text = "\n".join(x.read_text(encoding="utf-8") for x in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer(text)["input_ids"]
    parts, at = [], 0
    for i in range(count):
        length = shortest + (longest - shortest) * (i * 7 % count) // max(count - 1, 1)
        parts.append(ids[at : at + length])
        at = (at + length) % (len(ids) - longest)
    return parts


def fill(llm: Any, texts: list[list[int]], patience: int) -> dict[str, Any]:
    """Let requests in until no more fit: how many there were, and all their moments."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    usable = pool.get_num_free_blocks()
    look = Look(scheduler) if scheduler.connector is not None else None
    # Longer than it takes until the pool is full.
    wanted = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
    for i, ids in enumerate(texts):
        engine.add_request(str(i), {"prompt_token_ids": ids}, wanted)
    running: list[int] = []
    used: list[int] = []
    while scheduler.waiting and (len(running) <= patience or running[-1] > running[-1 - patience]):
        engine.step()
        if look is not None:
            look.after()
        running.append(len(scheduler.running))
        used.append(usable - pool.get_num_free_blocks())
    preempted = sum(x.num_preemptions for x in scheduler.requests.values())
    context = sum(x.num_computed_tokens for x in scheduler.running)
    found = {
        "running": running[-1],
        "most_running": max(running),
        "waiting": len(scheduler.waiting),
        "tokens_of_context": context,
        "blocks_in_use": used[-1],
        "usable_blocks": usable,
        "preemptions": preempted,
        "steps": len(running),
        "running_by_step": running,
    }
    return found | ({} if look is None else lives_of(look.lives))


def lives_of(lives: dict[str, list[Moment]]) -> dict[str, Any]:
    """What all requests hold in the end, together; and the first ones' moments, of decoding every 32nd step."""
    last = [asdict(moments[-1]) for moments in lives.values()]
    together = {name: round(sum(x[name] for x in last), 1) for name in last[0]}
    first = {}
    for request, moments in list(lives.items())[:4]:
        steps = [b.context - a.context for a, b in pairwise([Moment(0, 0, 0, 0, 0, 0), *moments])]
        shown = [
            x for i, (x, n) in enumerate(zip(moments, steps, strict=True)) if n > 1 or not i % 32
        ]
        first[request.partition("-")[0]] = [asdict(x) for x in (*shown, moments[-1])]
    most = max(x.reserved - x.kept for moments in lives.values() for x in moments)
    return {"all_requests": together, "most_on_their_way": most, "first_requests": first}


def main() -> None:
    """One engine after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR", help="of DMS")
    parser.add_argument("--lengths", type=int, nargs=2, default=[1000, 3000], help="of prompts")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=97, help=f"of {PAGE} tokens, one unused")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a step")
    parser.add_argument("--patience", type=int, default=16, help="steps without a new request")
    parser.add_argument("--note", default="", help="about the models")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    from vllm import LLM

    models = {name: Path(place) for name, place in (x.split("=", 1) for x in options.models)}
    content: dict[str, Any] = {"machine": machine() | {"note": options.note}}
    content["settings"] = {
        name: getattr(options, name) for name in ("lengths", "requests", "blocks", "chunk")
    }
    with tempfile.TemporaryDirectory() as folder:
        models["dense"] = dense_twin(next(iter(models.values())), Path(folder) / "dense")
        for name, model in models.items():
            llm = LLM(
                str(model),
                dtype="float32",
                enforce_eager=True,
                max_num_batched_tokens=options.chunk,
                max_model_len=options.lengths[1] + 1000,
                max_num_seqs=64,
                block_size=PAGE,
                num_gpu_blocks_override=options.blocks,
                enable_prefix_caching=False,
            )
            texts = prompts(llm.get_tokenizer(), options.requests, *options.lengths)
            content[name] = fill(llm, texts, options.patience)
            content[name]["dms"] = ratio_of(model)
            llm.llm_engine.engine_core.shutdown()
            write(options.output, content)
            print(
                name, {x: y for x, y in content[name].items() if x != "first_requests"}, flush=True
            )


def ratio_of(model: Path) -> float | None:
    """The compression ratio that a directory was made for."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return config.get("dms_config", {}).get("target_cr")


if __name__ == "__main__":
    main()
