# SPDX-License-Identifier: Apache-2.0
"""Runs requests on vLLM and looks at its scheduler after every step. A script for vLLM's own interpreter.

Reads a JSON list of jobs from the file that it is called with, and writes a list of results to the second:

    job     {"model": DIR, "settings": {...of vllm.LLM...}, "prompts": [[ids]], "tokens": n, "environment": {},
            "interpreted": whether Triton's interpreter computes attention (it must be there, and TRITON_INTERPRET=1)}
    result  {"tokens": [[ids]], "peak_blocks", "dense_blocks" (at that step, by context), "share" (held / dense at the
            step with most context), "running" (most at a time), "preemptions", "forced" (requests), "free_at_end",
            "pool", "steps", "drafted" and "accepted" (tokens), "error": text, if the engine did not start}
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from typing import Any

# The scheduler in this process, where it can be looked at; workers are processes of their own.
DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update(DEFAULTS)

PAGE = 64


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    os.environ.update(job.get("environment", {}))
    settings = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, **job["settings"]}
    settings.setdefault("max_model_len", 1024)
    settings.setdefault(
        "kv_cache_memory_bytes", 1 << 30
    )  # on a GPU too: one engine follows the other
    if job.get("interpreted"):
        interpret()
    try:
        llm = LLM(job["model"], **settings)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    try:
        return watch(llm, job)
    finally:
        llm.llm_engine.engine_core.shutdown()
        for name in job.get("environment", {}):
            os.environ[name] = DEFAULTS[name]


def interpret() -> None:
    """Let kernels run on the CPU, where they would be left to PyTorch."""
    from modelopt_dms.kernels import dispatch, library

    assert library.has_triton() and library.interpreting()
    dispatch.choose = lambda impl, device: "triton"


def watch(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    usable = pool.get_num_free_blocks()
    wanted = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True)
    for i, ids in enumerate(job["prompts"]):
        engine.add_request(str(i), {"prompt_token_ids": ids}, wanted)
    count = Drafts(scheduler)
    tokens: dict[int, list[int]] = {}
    preemptions: dict[str, int] = {}
    peak = dense_then = running = steps = 0
    most_context, share = 0, 0.0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
        held = usable - pool.get_num_free_blocks()
        dense = sum(-(-x.num_computed_tokens // PAGE) for x in scheduler.running)
        running = max(running, len(scheduler.running))
        if held > peak:
            peak, dense_then = held, dense
        if dense > most_context:
            most_context, share = dense, held / dense
        for name, request in scheduler.requests.items():
            preemptions[name] = request.num_preemptions
    connector = scheduler.connector
    return {
        "tokens": [tokens[i] for i in range(len(job["prompts"]))],
        "peak_blocks": peak,
        "dense_blocks": dense_then,
        "share": share,
        "running": running,
        "preemptions": sum(preemptions.values()),
        "forced": getattr(connector, "ever_forced", 0),
        "free_at_end": pool.get_num_free_blocks(),
        "pool": usable,
        "steps": steps,
        "drafted": count.drafted,
        "accepted": count.accepted,
    }


class Drafts:
    """Counts what the scheduler hears of drafts."""

    def __init__(self, scheduler: Any) -> None:
        self.drafted = self.accepted = 0
        self.told, scheduler.make_spec_decoding_stats = scheduler.make_spec_decoding_stats, self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.drafted += kwargs["num_draft_tokens"]
        self.accepted += kwargs["num_accepted_tokens"]
        return self.told(*args, **kwargs)


def run_apart(job: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: once vLLM has loaded numba for n-grams, no other engine starts (0.32.0)."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("jobs.json", "results.json")]
        with open(paths[0], "w", encoding="utf-8") as file:
            json.dump([job | {"apart": True}], file)
        subprocess.run([sys.executable, __file__, *paths], check=True)
        with open(paths[1], encoding="utf-8") as file:
            (result,) = json.load(file)
    return result


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    results = []
    for one in jobs:
        apart = "speculative_config" in one["settings"] and "apart" not in one
        results.append(run_apart(one) if apart else run(one))
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            json.dump(results, file)
