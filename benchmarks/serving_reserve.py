# SPDX-License-Identifier: Apache-2.0
"""What the vLLM plug-in reserves for requests over their lives, and what for: rows, rounding, tokens on their way.

    .venv-vllm/bin/python benchmarks/serving_reserve.py --model smollm2-cr4 --output reserve.json

A script for vLLM's interpreter: the engine runs in this process, and its scheduler is looked at twice a step, before
the workers run (what is reserved) and after they have reported (what is kept). All numbers are blocks, which are exact
counts: they depend on the model and the texts only, not on the machine.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import machine, write

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


def prompts(tokenizer: Any, lengths: list[int]) -> list[list[int]]:
    """Parts of this repository's documentation."""
    text = "\n".join(x.read_text(encoding="utf-8") for x in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer(text)["input_ids"]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def main() -> None:
    """Run the requests one step after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a DMS directory")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 3000])
    parser.add_argument("--tokens", type=int, default=48, help="of every answer")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a step")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    longest = max(options.lengths) + options.tokens
    llm = LLM(
        str(options.model),
        dtype="float32",
        enforce_eager=True,
        max_num_batched_tokens=options.chunk,
        max_model_len=longest,
        max_num_seqs=8,
    )
    engine = llm.llm_engine
    look = Look(engine.engine_core.engine_core.scheduler)
    wanted = SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True)
    for i, ids in enumerate(prompts(llm.get_tokenizer(), options.lengths)):
        engine.add_request(str(i), {"prompt_token_ids": ids}, wanted)
    while engine.has_unfinished_requests():
        engine.step()
        look.after()
    lives = {x.partition("-")[0]: [asdict(y) for y in moments] for x, moments in look.lives.items()}
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    content = {"machine": machine(), "chunk": options.chunk, "dms": config["dms_config"]}
    write(options.output, {**content, "lives": lives})
    for name, moments in lives.items():
        for moment in (*moments[:8], moments[-1]):
            print(name, moment)


if __name__ == "__main__":
    main()
