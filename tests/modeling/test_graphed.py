# SPDX-License-Identifier: Apache-2.0
"""Decoding with steps of fixed shapes on a cache of pages: the same tokens as plain `generate`."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import build_dms, feed, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import modelopt_dms as dms
from modelopt_dms.kernels.layout import PAGE, OutOfPagesError
from modelopt_dms.kvcache.hf_cache import DMSLayer, kv_stats
from modelopt_dms.kvcache.reserve import pages_per_list
from modelopt_dms.modeling import generation, paged_attention

NEW, PROMPT = 40, 17


@pytest.fixture(scope="module", params=["llama", "gemma2", "deepseek_v3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_dms(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build_dms("llama")


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **options)


def left_padded() -> tuple[Tensor, Tensor]:
    ids, mask = tokens(3, PROMPT), torch.ones(3, PROMPT, dtype=torch.long)
    ids[1, :5] = mask[1, :5] = 0
    return ids, mask


def live(model: PreTrainedModel) -> Tensor:
    return torch.stack([x.resident for x in kv_stats(model).layers])


def test_greedy_tokens_and_live_lengths_are_those_of_generate(model: PreTrainedModel) -> None:
    ids, mask = left_padded()
    plain = generate(model, ids, attention_mask=mask)
    held = live(model)
    assert torch.equal(
        generate(model, ids, attention_mask=mask, custom_generate=dms.graphed), plain
    )
    assert torch.equal(live(model), held)


def test_samples_are_those_of_generate_for_the_same_seed(llama: PreTrainedModel) -> None:
    ids, mask = left_padded()
    found = []
    for options in ({}, {"custom_generate": dms.graphed}):
        torch.manual_seed(3)
        sampling = {"do_sample": True, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.2}
        found.append(generate(llama, ids, attention_mask=mask, **sampling, **options))
    assert torch.equal(*found)


def test_finished_sequences_are_padded_and_give_their_pages_back(llama: PreTrainedModel) -> None:
    ids = tokens(4, PROMPT)
    end = int(generate(llama, ids)[0, PROMPT + 6])
    options = {"eos_token_id": end, "max_new_tokens": 60}
    plain = generate(llama, ids, **options)
    assert (plain[0] == 0).any() and not (plain[:, PROMPT:] == 0).all(0).any()
    out = generate(llama, ids, **options, custom_generate=dms.graphed, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    cache = out.past_key_values
    cache.check_integrity()
    released = ~cache.active
    assert released.any()
    left = int(cache.active.sum())
    assert [x.resident.shape[0] for x in kv_stats(cache).layers] == [left] * 2
    assert kv_stats(cache).context_tokens > PROMPT
    for layer in cache.layers:
        assert not layer.slots.state.live[released].any()
        assert not layer.slots.state.table[released].any()


def test_it_ends_with_the_longest_sequence(llama: PreTrainedModel) -> None:
    ids = tokens(1, PROMPT)
    end = int(generate(llama, ids)[0, PROMPT + 3])
    out = generate(llama, ids, eos_token_id=end, custom_generate=dms.graphed)
    assert torch.equal(out, generate(llama, ids, eos_token_id=end))
    assert out.shape[1] <= PROMPT + 4


def test_a_streamer_gets_every_token(llama: PreTrainedModel) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Collect()
    out = generate(llama, tokens(1, PROMPT), custom_generate=dms.graphed, stream_to=streamer)
    assert streamer.tokens == [*out[0].tolist(), -1]


def test_turns_go_on_from_the_cache_that_came_back(llama: PreTrainedModel) -> None:
    cache = dms.DMSCache(llama, batch_size=2, max_length=120)
    plain = DynamicCache(config=llama.config)
    ids = tokens(2, PROMPT)
    for turn in range(3):
        options = {"return_dict_in_generate": True, "max_new_tokens": 12}
        out = generate(llama, ids, past_key_values=cache, custom_generate=dms.graphed, **options)
        expected = generate(llama, ids, past_key_values=plain, **options)
        assert torch.equal(out.sequences, expected.sequences)
        ids = torch.cat([out.sequences, tokens(2, 7, seed=turn)], dim=1)


def test_a_cache_of_pages_works_in_plain_generate_and_can_be_reset(model: PreTrainedModel) -> None:
    ids, mask = left_padded()
    plain = generate(model, ids, attention_mask=mask)
    cache = dms.DMSCache(model, batch_size=3, max_length=64, max_cache_bytes=1 << 20)
    for _ in range(2):
        out = generate(model, ids, attention_mask=mask, past_key_values=cache)
        assert torch.equal(out, plain)
        cache.check_integrity()
        cache.reset()


def test_a_long_prompt_is_read_in_chunks(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    ids[1, :9] = mask[1, :9] = 0
    expected = generate(model, ids, attention_mask=mask)
    monkeypatch.setattr(paged_attention, "CHUNK", 16)
    out = generate(model, ids, attention_mask=mask, custom_generate=dms.graphed)
    assert torch.equal(out, expected)


def test_packed_documents_longer_than_a_chunk_are_refused(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, positions = tokens(1, 40), torch.arange(20).repeat(2)[None]
    mask = torch.block_diag(*[torch.ones(20, 20)] * 2).tril().bool()[None, None]
    options = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        full = llama(ids, use_cache=False, **options).logits
        cache = dms.DMSCache(llama, batch_size=1, max_length=64)
        found = llama(ids, past_key_values=cache, **options).logits
        torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)
        monkeypatch.setattr(paged_attention, "CHUNK", 16)
        cache = dms.DMSCache(llama, batch_size=1, max_length=64)
        with pytest.raises(ValueError, match="packed documents of more than 16 tokens"):
            llama(ids, past_key_values=cache, **options)


def pages(count: int) -> int:
    """Bytes of so many pages of the tiny model."""
    return count * PAGE * 2 * 8 * 4


def test_a_pool_that_is_too_small_names_the_limit_and_the_knob(llama: PreTrainedModel) -> None:
    ids = tokens(2, 120)
    options = {"custom_generate": dms.graphed, "max_new_tokens": 50}
    with pytest.raises(OutOfPagesError, match="it has 8 of 64 slots.*raise max_cache_bytes"):
        generate(llama, ids, max_cache_bytes=pages(8), **options)
    with pytest.raises(ValueError, match="7 pages .* but 8 lists .* need one each"):
        generate(llama, ids, max_cache_bytes=pages(7), **options)
    assert generate(llama, ids, max_cache_bytes=pages(24), **options).shape[1] == 170


def test_a_full_pool_evicts_instead_if_it_is_told_to(llama: PreTrainedModel) -> None:
    ids = tokens(2, 120)
    options = {"custom_generate": dms.graphed, "max_new_tokens": 200, "on_full": "evict"}
    options |= {"return_dict_in_generate": True, "max_cache_bytes": pages(16)}
    out = generate(llama, ids, **options)
    assert out.sequences.shape[1] == 320
    out.past_key_values.check_integrity()
    assert kv_stats(llama).reserved_bytes == pages(16)
    assert torch.equal(generate(llama, ids, **options).sequences, out.sequences)
    plenty = generate(llama, ids, **options | {"max_cache_bytes": pages(48)})
    plain = generate(llama, ids, max_new_tokens=200)
    assert torch.equal(plenty.sequences, plain) and not torch.equal(out.sequences, plain)
    assert torch.equal(out.sequences[:, :121], plain[:, :121])


def test_plain_generate_evicts_too(llama: PreTrainedModel) -> None:
    cache = dms.DMSCache(
        llama, batch_size=4, max_length=320, max_cache_bytes=pages(40), on_full="evict"
    )
    generate(llama, tokens(2, 120), past_key_values=cache, max_new_tokens=150, num_beams=2)
    cache.check_integrity()
    assert cache.pools[0].check() <= 40


def test_what_happens_when_a_pool_is_full_is_said_where_it_is_made(llama: PreTrainedModel) -> None:
    options = {"custom_generate": dms.graphed, "on_full": "evict"}
    with pytest.raises(ValueError, match="on_full='evict' needs max_cache_bytes"):
        generate(llama, tokens(1, 5), **options)
    cache = dms.DMSCache(llama, batch_size=1, max_length=50)
    with pytest.raises(generation.GenerationError, match="on_full are for the cache made here"):
        generate(llama, tokens(1, 5), past_key_values=cache, **options)


def test_kv_stats_says_what_is_reserved_resident_and_free(llama: PreTrainedModel) -> None:
    cache = dms.DMSCache(llama, batch_size=2, max_length=170, max_cache_bytes=pages(50))
    options = {"past_key_values": cache, "custom_generate": dms.graphed, "max_new_tokens": 50}
    generate(llama, tokens(2, 120), **options)
    stats = kv_stats(cache)
    assert stats.reserved_bytes == pages(50)
    assert stats.free_bytes == int(cache.pools[0].pool.counters[0]) * pages(1)
    live = sum(int(x.resident.sum()) for x in stats.layers)
    assert stats.resident_bytes == live * pages(1) // PAGE < stats.kv_bytes
    assert f"{pages(50)} bytes reserved, {stats.resident_bytes} resident" in str(stats)
    del cache, options
    assert kv_stats(llama).reserved_bytes == pages(50)


def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths at which a captured graph would have been lost, from now on."""
    moved: list[int] = []
    monkeypatch.setattr(
        generation.DecodeStep, "release", lambda self: moved.append(self.cache.get_seq_length())
    )
    return moved


@pytest.mark.parametrize("prompt", [3, 130])
def test_a_right_reserve_is_taken_before_the_prompt_and_never_moves(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, prompt: int
) -> None:
    ids, moved = tokens(2, prompt), moves(monkeypatch)
    length = prompt + 300
    options = {"max_new_tokens": 300, "custom_generate": dms.graphed}
    generate(llama, ids, **options)
    held, gate = kv_stats(llama), llama.model.layers[0].self_attn.dms_gate
    share = 1.0 - 1.0 / held.compression_ratio
    monkeypatch.setattr(generation, "expected_evicted_share", lambda model: share)
    moved.clear()
    out = generate(llama, ids, return_dict_in_generate=True, **options)
    (pool,) = out.past_key_values.pools
    lists = 2 * sum(x.resident.shape[1] for x in held.layers)
    assert pool.pool.pages == lists * pages_per_list(length, share, gate.window, gate.protect_first)
    assert not moved


def test_a_reserve_that_was_too_small_grows_once_by_what_is_in_use(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = moves(monkeypatch)
    monkeypatch.setattr(generation, "expected_evicted_share", lambda model: 0.99)
    ids = tokens(2, 9)
    options = {"max_new_tokens": 400, "custom_generate": dms.graphed}
    out = generate(llama, ids, return_dict_in_generate=True, **options)
    out.past_key_values.check_integrity()
    assert 1 <= len(moved) <= 2
    held = kv_stats(llama)
    assert out.past_key_values.pools[0].kv_bytes <= held.dense_bytes + len(held.layers) * pages(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    ],
)
def test_what_the_loop_does_not_do_is_refused(
    llama: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(generation.GenerationError, match=message):
        generate(llama, tokens(1, 5), custom_generate=dms.graphed, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: {"batch_size": 0, "max_length": 9}, "batch_size=0 must be at least 1"),
        (lambda model: {"batch_size": 1, "max_length": 9, "impl": "cuda"}, "impl='cuda' must be"),
        (lambda model: {"batch_size": 1, "max_length": -1}, "max_length=-1 must be at least 1"),
    ],
)
def test_a_cache_that_cannot_be_made_is_refused(
    llama: PreTrainedModel, make: Callable[[Any], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dms.DMSCache(llama, **make(llama))


def test_what_a_graph_cannot_hold_runs_step_by_step(llama: PreTrainedModel) -> None:
    def captured(model: PreTrainedModel) -> bool:
        cache = dms.DMSCache(model, batch_size=1, max_length=9)
        return generation.can_be_captured(model, cache)

    assert captured(llama) and captured(build_dms("deepseek_v3"))
    assert not captured(build_dms("gemma2"))  # its sliding layers have caches of transformers' own
    looking = build_dms("llama")
    looking.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not captured(looking)


@torch.no_grad()
def test_what_turns_out_not_to_be_captured_runs_step_by_step_after_a_warning(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Capture:
        def __init__(self, *args: Any) -> None:
            pass

        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *error: Any) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    step = prepared(llama)
    with pytest.warns(UserWarning, match=r"not permitted.*goes on step by step"):
        assert not generation._captured(step)
    assert step.cache.get_seq_length() == 9
    assert step().isfinite().all()
    assert step.cache.get_seq_length() == 10


def prepared(model: PreTrainedModel, **options: Any) -> generation.DecodeStep:
    """A step after a prompt of 9 tokens."""
    cache = dms.DMSCache(model, batch_size=1, max_length=64, max_cache_bytes=pages(9), **options)
    model(tokens(1, 9), past_key_values=cache)
    return generation.DecodeStep(model, cache, tokens(1, 1), torch.tensor([[9]]))


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for the device, or copies from the host: a capture allows neither."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = {"_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero"}
        assert op.overloadpacket.__name__ not in waits, op
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("gate", ["adapter", "residual", "neuron"])
@torch.no_grad()
def test_a_decode_step_of_every_gate_waits_for_nothing(gate: str) -> None:
    step = prepared(build_dms("llama", gate=gate), impl="triton")
    with NoWaiting():
        logits = step()
    assert logits.isfinite().all()


def test_a_cache_for_other_sequences_is_refused(llama: PreTrainedModel) -> None:
    cache = dms.DMSCache(llama, batch_size=2, max_length=30)
    with pytest.raises(ValueError, match="holds 2 sequences, got 3"):
        generate(llama, tokens(3, 5), past_key_values=cache, custom_generate=dms.graphed)
    with pytest.raises(ValueError, match="max_length=30"):
        generate(llama, tokens(2, 5), past_key_values=cache, custom_generate=dms.graphed)


def test_the_kernels_write_and_read_what_the_reference_does(llama: PreTrainedModel) -> None:
    """Interpreted, from the prompt's chunk to decoding; tokens and what is held."""
    ids, found = tokens(2, 12), []
    for impl in ("reference", "triton"):
        cache = dms.DMSCache(llama, batch_size=2, max_length=64, impl=impl)
        with torch.no_grad():
            logits, _ = feed(llama, ids, [9, 1, 1, 1], cache)
        assert all(isinstance(x, DMSLayer) for x in cache.layers)
        found.append((logits, live(llama)))
    (logits, held), (other, other_held) = found
    assert torch.equal(held, other_held)
    torch.testing.assert_close(other, logits, rtol=1e-4, atol=1e-4)
