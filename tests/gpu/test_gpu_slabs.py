# SPDX-License-Identifier: Apache-2.0
"""KV rows of vLLM's requests on a CUDA device: attention equals the mask over whole sequences, also in 16 bits.

Every test runs on a CPU too, with the references, so that what a GPU says is not a mistake in the test.
"""

from typing import Any

import pytest
import torch
from slab_bench import BLOCKS, Bench

from modelopt_dms.serving.vllm.slab_tables import Rules

DEVICES = [("cpu", "reference"), pytest.param(("cuda", "triton"), marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES, ids=["cpu", "cuda"])
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    device, impl = request.param
    return {"device": device, "impl": impl}


def begun(bench: Bench) -> Bench:
    for seed, name in enumerate("abc"):
        bench.arrive(name, 700, seed)
    for sizes in ({"a": 200}, {"b": 333, "a": 1}, {"a": 150, "b": 1, "c": 1}, {"c": 90}):
        bench.step(sizes)
    return bench


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ragged_requests_attend_as_under_the_mask(
    where: dict[str, Any], dtype: torch.dtype
) -> None:
    rules = Rules(window=20, shift=1, protect_first=2)
    bench = begun(Bench(rules, 0.8, dim=64, dtype=dtype, **where))
    for _ in range(60):
        bench.step(dict.fromkeys("abc", 1))
    worst = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    assert max(bench.error(x) for x in "abc") < worst


def test_rejected_drafts_leave_no_trace(where: dict[str, Any]) -> None:
    bench = begun(Bench(Rules(window=20, shift=1, protect_first=2), 0.8, dim=64, **where))
    for right in range(4):
        bench.step(dict.fromkeys("abc", 1), {"a": (5, right), "c": (3, min(3, right))})
    bench.step(dict.fromkeys("abc", 1))
    assert max(bench.error(x) for x in "abc") < 1e-4


def test_capped_requests_finish(where: dict[str, Any]) -> None:
    rules = Rules(window=20, shift=0, protect_first=3)
    bench = Bench(rules, evicted=0.1, limit=3, dim=64, **where)
    bench.arrive("a", 700, seed=5)
    for size in (150, 260, *[1] * 40):
        bench.step({"a": size})
    assert bench.slabs.usage(["a"])["a"][2].forced > 0
    assert len(bench.blocks["a"]) <= 3 < BLOCKS
    for held in bench.positions("a"):
        assert {0, 1, 2, *range(bench.seen["a"] - 20, bench.seen["a"])} <= set(held)
