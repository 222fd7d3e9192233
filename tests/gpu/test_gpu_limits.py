# SPDX-License-Identifier: Apache-2.0
"""On a CUDA device: 16-bit numbers, many lists, a long generation, and each kind of gate in a captured graph.

Every test runs on a CPU too, in small, so that what a GPU says is not a mistake in the test.
"""

from typing import Any

import pytest
import torch
from families import build_dms, feed, tokens
from torch import Tensor

import modelopt_dms as dms
from modelopt_dms.evaluation.peers import random_eviction
from modelopt_dms.kernels import dispatch
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.kvcache.page_pool import SharedPool
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pages on both devices."""
    monkeypatch.setattr("modelopt_dms.kvcache.hf_cache.uses_pages", lambda device: True)
    return request.param


@pytest.mark.parametrize("kv", ["bfloat16", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bf16_models_are_close_to_float32(device: str, head_dim: int, kv: str) -> None:
    # Decisions by position: those of a gate would flip where bfloat16 rounds.
    ids, found = tokens(2, 150), []
    for dtype, place in ((torch.float32, "cpu"), (torch.bfloat16, device)):
        model = build_dms("llama", base={"head_dim": head_dim})
        if kv == "fp8":
            quant = dms.load_recipe("kv_fp8_dynamic-dms_cr8").quantize
            model = dms.quantize(model, quant, [{"input_ids": tokens(2, 60)}])
        model = random_eviction(model.to(dtype).to(place), 0.5)
        with torch.no_grad():
            logits, _ = feed(model, ids.to(place), [100, 1, 1, 30, *[1] * 18])
        found.append(logits.float().cpu())
    wanted, got = found
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    assert (got - wanted).abs().max() < 0.15 * wanted.abs().max()


@pytest.mark.parametrize("gate", ["adapter", "neuron", "residual"])
def test_every_kind_of_gate_runs_in_a_captured_graph(device: str, gate: str) -> None:
    model = build_dms("llama", gate=gate).to(device)
    ids = tokens(2, 40).to(device)
    options: dict[str, Any] = {"max_new_tokens": 40, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **options)
    graph = device == "cuda"
    out = model.generate(ids, custom_generate=dms.graphed, graph=graph, **options)
    assert torch.equal(out, plain)


def test_more_lists_than_a_grid_is_high(device: str) -> None:
    batch = 8_200 if device == "cuda" else 40  # of 8 KV heads: 65,600 lists
    found = []
    for impl in ("auto", "reference"):
        slots = PagedHeadCaches(4, 0, SharedPool(torch.device(device), impl))
        generator = torch.Generator(device).manual_seed(0)

        def rows(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, 16, device=device, generator=generator)

        for T in (9, 1, 1):
            evict = torch.rand(batch, 8, T, device=device, generator=generator) < 0.5
            slots.append(rows(batch, 8, T), rows(batch, 8, T), evict, None)
        slots.shared.check()
        q = rows(batch, 16)
        arguments = (q, slots.pool, slots.state, Scoring(0.25))
        found.append((dispatch.decode_attention(*arguments, impl=impl), slots.live.clone()))
    (out, live), (expected, lengths) = found
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(live, lengths)


def test_a_short_prompt_and_a_long_generation_take_less_than_a_dense_cache(device: str) -> None:
    """The workload that DMS is for: no reserve from the prompt's length may ask for more than keeping every token."""
    new = 32_000 if device == "cuda" else 300
    model = build_dms("llama", base={"max_position_embeddings": 40_000}).to(device)
    ids = tokens(1, 10).to(device)
    options = {"max_new_tokens": new, "min_new_tokens": new, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, custom_generate=dms.graphed, graph=device == "cuda", **options)
    stats = kv_stats(model)
    assert stats.context_tokens == 10 + new - 1
    slack = len(stats.layers) * 64 * stats.dense_bytes / (stats.context_tokens * len(stats.layers))
    assert stats.reserved_bytes <= stats.dense_bytes + 2 * slack
