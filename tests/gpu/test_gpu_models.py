# SPDX-License-Identifier: Apache-2.0
"""On a CUDA device: the kernels, the growing pool and the captured graph give what the CPU gives."""

from typing import Any

import pytest
import torch
from families import build_dms, feed, frozen_base, tokens
from torch import Tensor
from transformers import PreTrainedModel

import modelopt_dms as dms
from modelopt_dms.gates.gate import record_alpha, set_relaxation
from modelopt_dms.kernels.layout import PAGE
from modelopt_dms.kvcache.hf_cache import DMSLayer, kv_stats
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches
from modelopt_dms.modeling import generation
from modelopt_dms.modeling.generation import DecodeStep

pytestmark = pytest.mark.gpu

PROMPT, NEW = 40, 80
FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3")


@pytest.fixture(autouse=True)
def exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    ids = ids.to(model.device)
    options = {"max_new_tokens": NEW, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **options).cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_live_lengths_are_those_of_the_cpu(family: str) -> None:
    ids, found = tokens(3, 150), []
    for device in ("cpu", "cuda"):
        model = build_dms(family).to(device)
        with torch.no_grad():
            logits, cache = feed(model, ids.to(device), [100, 1, 1, 1, 30, *[1] * 17])
        found.append((logits.cpu(), [x.resident.cpu() for x in kv_stats(cache).layers]))
    assert all(
        isinstance(x.slots, PagedHeadCaches) for x in cache.layers if isinstance(x, DMSLayer)
    )
    (expected, lengths), (logits, paged_lengths) = found
    torch.testing.assert_close(logits, expected, rtol=2e-3, atol=2e-3)
    for x, y in zip(lengths, paged_lengths, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek_v3"])
def test_a_captured_graph_gives_the_tokens_of_plain_generate(family: str, compile: bool) -> None:
    model = build_dms(family).cuda()
    ids, mask = tokens(3, PROMPT).cuda(), torch.ones(3, PROMPT, dtype=torch.long).cuda()
    ids[1, :7] = mask[1, :7] = 0
    plain = generate(model, ids, attention_mask=mask)
    for graph in (False, True):
        options = {"custom_generate": dms.graphed, "graph": graph, "compile": compile}
        assert torch.equal(generate(model, ids, attention_mask=mask, **options), plain)


def test_graphs_survive_a_growing_pool_and_finished_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_dms("llama").cuda()
    ids = tokens(6, PROMPT)
    plain = generate(model, ids, max_new_tokens=300)
    end = int(plain[0, PROMPT + 30])
    options = {"max_new_tokens": 300, "eos_token_id": end}
    monkeypatch.setattr(generation, "expected_evicted_share", lambda model: 0.99)  # too little
    out = generate(model, ids, custom_generate=dms.graphed, **options)
    assert torch.equal(out, generate(model, ids, **options))


def test_a_captured_graph_goes_on_after_forced_eviction() -> None:
    model = build_dms("llama").cuda()
    ids, page = tokens(2, 120), PAGE * 2 * 8 * 4
    options = {"custom_generate": dms.graphed, "max_new_tokens": 200}
    options |= {"max_cache_bytes": 16 * page, "on_full": "evict"}
    found = [generate(model, ids, graph=graph, **options) for graph in (False, True)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], generate(model, ids, max_new_tokens=200))


def test_a_decode_step_never_asks_the_host() -> None:
    model = build_dms("qwen3").cuda()
    cache = dms.DMSCache(model, batch_size=2, max_length=256, max_cache_bytes=1 << 22)
    with torch.no_grad():
        model(tokens(2, PROMPT).cuda(), past_key_values=cache)
        token = torch.ones(2, 1, dtype=torch.long, device="cuda")
        step = DecodeStep(model, cache, token, torch.full_like(token, PROMPT))
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(30):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "recipe", ["kv_fp8_dynamic-dms_cr8", "kv_int8-dms_cr8", "kv_nvfp4-dms_cr8"]
)
def test_quantized_pages_are_close_to_fake_quantization(recipe: str) -> None:
    ids, found = tokens(2, 90), []
    for device in ("cpu", "cuda"):
        model = build_dms("llama", base={"head_dim": 16})
        quant = dms.load_recipe(recipe).quantize
        model = dms.quantize(model, quant, [{"input_ids": tokens(2, 60)}]).to(device)
        with torch.no_grad():
            logits, _ = feed(model, ids.to(device), [60, *[1] * 30])
        found.append(logits.cpu())
    assert (found[0] - found[1]).abs().max() < 0.02 * found[0].abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_gradients_of_gates_are_those_of_the_cpu(family: str) -> None:
    ids, found = tokens(2, 130), []
    for device in ("cpu", "cuda"):
        model = build_dms(family).to(device).train()
        set_relaxation(model, None, 0.5)
        with frozen_base(model) as parameters, record_alpha(model) as record:
            logits = model(ids.to(device), use_cache=False).logits
            loss = logits.square().mean() + sum(x.mean() for x in record.alphas.values())
            loss.backward()
            found.append([x.grad.cpu().clone() for x in parameters])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(y, x, rtol=5e-3, atol=1e-4 * float(x.abs().max()))
