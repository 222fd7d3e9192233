# SPDX-License-Identifier: Apache-2.0
"""Plain `generate` on a cache that forgets: every way of decoding gives what the full masked forward gives."""

import copy
from typing import Any

import pytest
import torch
from families import build, build_dms, distance, feed, greedy_without_cache, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from modelopt_dms.gates import handover
from modelopt_dms.kvcache.hf_cache import DMSLayer, kv_stats
from modelopt_dms.modeling.convert import dms_modules

NEW = 20
PROMPT = 17


@pytest.fixture(autouse=True, params=["lists", "pages"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where rows lie: as on a CPU, or as on a CUDA device (with what the kernels mean in place of the kernels)."""
    monkeypatch.setattr(
        "modelopt_dms.kvcache.hf_cache.uses_pages", lambda device: request.param == "pages"
    )
    return request.param


@pytest.fixture(scope="module", params=["llama", "gemma3", "deepseek_v3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_dms(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build_dms("llama")


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **options)


def logprob(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Sum of the log-probabilities [B] of the generated part, from one full masked forward."""
    with torch.no_grad():
        scores = model(ids, use_cache=False).logits.log_softmax(-1)
    picked = scores[:, PROMPT - 1 : -1].gather(-1, ids[:, PROMPT:, None])
    return picked.squeeze(-1).sum(-1)


def test_greedy_equals_recomputing_every_step(model: PreTrainedModel) -> None:
    ids = tokens(2, PROMPT)
    with torch.no_grad():
        assert torch.equal(generate(model, ids), greedy_without_cache(model, ids, NEW))


def test_sampling_with_a_seed_is_the_same_with_and_without_a_cache(model: PreTrainedModel) -> None:
    ids, found = tokens(2, PROMPT), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(generate(model, ids, do_sample=True, use_cache=use_cache))
    assert torch.equal(*found)


def test_beams_are_the_same_with_and_without_a_cache(model: PreTrainedModel) -> None:
    options = {"num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True}
    options |= {"output_scores": True, "length_penalty": 0.0}
    ids = tokens(2, PROMPT)
    with_cache = generate(model, ids, **options)
    without = generate(model, ids, **options, use_cache=False)
    assert torch.equal(with_cache.sequences, without.sequences)
    expected = logprob(model, with_cache.sequences)
    assert distance(with_cache.sequences_scores, expected) < 1e-4


def test_several_samples_of_one_prompt_have_lists_of_their_own(llama: PreTrainedModel) -> None:
    torch.manual_seed(3)
    out = generate(
        llama, tokens(1, PROMPT), do_sample=True, num_return_sequences=4, max_new_tokens=40
    )
    assert len({tuple(row) for row in out.tolist()}) == 4
    live = torch.stack([layer.resident for layer in kv_stats(llama).layers])
    assert live.shape[1] == 4 and len(live.sum((0, 2)).unique()) > 1
    rows = [generate(llama, row[None], max_new_tokens=1) for row in out[:, :-1]]
    assert torch.equal(kv_stats(llama).layers[0].resident[0], live[0, 3])
    assert len(rows) == 4


def test_a_left_padded_batch_equals_each_row_alone(model: PreTrainedModel) -> None:
    prompts = [tokens(1, n, seed=n) for n in (5, 11, PROMPT)]
    alone = [generate(model, ids)[0, ids.shape[1] :] for ids in prompts]
    lives = []
    for ids in prompts:
        generate(model, ids)
        lives.append(torch.stack([x.resident[0] for x in kv_stats(model).layers]))
    padded = torch.stack([torch.nn.functional.pad(x[0], (PROMPT - x.shape[1], 0)) for x in prompts])
    mask = (padded != 0).long()
    together = model.generate(padded, attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(together[:, PROMPT:], torch.stack(alone))
    stats = kv_stats(model)
    assert torch.equal(torch.stack([x.resident for x in stats.layers]), torch.stack(lives, dim=1))
    assert stats.layers[0].context.tolist() == [n + NEW - 1 for n in (5, 11, PROMPT)]


def test_streaming_gives_the_same_tokens(llama: PreTrainedModel) -> None:
    class Collect(BaseStreamer):
        seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    streamer = Collect()
    out = generate(llama, tokens(1, PROMPT), streamer=streamer)
    assert streamer.seen == [*out[0].tolist(), -1]


def test_a_tokenizer_for_stop_strings_may_be_passed(llama: PreTrainedModel) -> None:
    """transformers 5.23 hands it on to attention, where it was refused."""
    ids = tokens(1, PROMPT)
    whole = llama.generate(ids, max_new_tokens=4)
    assert torch.equal(llama.generate(ids, max_new_tokens=4, tokenizer=object()), whole)


def test_turns_on_one_cache_equal_the_whole_conversation(model: PreTrainedModel) -> None:
    ids, cache = tokens(1, PROMPT), None
    for turn in range(3):
        out = generate(model, ids, past_key_values=cache, return_dict_in_generate=True)
        cache = out.past_key_values
        with torch.no_grad():
            assert torch.equal(out.sequences, greedy_without_cache(model, ids, NEW))
        ids = torch.cat([out.sequences, tokens(1, 7, seed=turn)], dim=1)
    assert all(x.slots.seen == ids.shape[1] - 8 for x in cache.layers if isinstance(x, DMSLayer))


def test_prefill_in_chunks_is_the_same(llama: PreTrainedModel) -> None:
    ids = tokens(1, 40)
    assert torch.equal(generate(llama, ids, prefill_chunk_size=7), generate(llama, ids))


def test_generation_goes_on_from_a_cache_that_was_passed(llama: PreTrainedModel) -> None:
    ids = tokens(1, 30)
    with torch.no_grad():
        _, cache = feed(llama, ids[:, :-1], [20, 9])
    assert torch.equal(generate(llama, ids, past_key_values=cache), generate(llama, ids))


@pytest.mark.parametrize("how", ["assistant", "itself", "prompt lookup"])
def test_assisted_decoding_equals_greedy(llama: PreTrainedModel, how: str) -> None:
    # Repetitions, so that drafts are accepted in part.
    ids = tokens(1, 6).repeat(1, 5)
    options: dict[str, Any] = {
        "assistant": {"assistant_model": build_dms("llama", seed=9)},
        "itself": {"assistant_model": copy.deepcopy(llama)},
        "prompt lookup": {"prompt_lookup_num_tokens": 6},
    }[how]
    assert torch.equal(
        generate(llama, ids, **options, max_new_tokens=30), generate(llama, ids, max_new_tokens=30)
    )


@pytest.mark.parametrize("back", [1, 5, 24])
def test_a_rollback_leaves_no_trace(llama: PreTrainedModel, back: int) -> None:
    ids = tokens(2, 50)
    with torch.no_grad():
        expected, _ = feed(llama, ids, [30, 20])
        _, cache = feed(llama, torch.cat([ids[:, :30], tokens(2, back, seed=8)], 1), [30, back])
        cache.crop(-back)
        again, cache = feed(llama, ids[:, 30:], [20], cache)
    assert distance(again, expected[:, 30:]) < 1e-5
    for layer in cache.layers:
        layer.slots.check_integrity()


def test_a_rollback_beyond_the_window_is_one_clear_error(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        _, cache = feed(llama, tokens(1, 200), [200])
    with pytest.raises(ValueError, match="cannot take back 30 tokens"):
        cache.crop(-30)


@pytest.mark.parametrize("kind", ["static", "offloaded"])
def test_caches_that_cannot_forget_are_refused(llama: PreTrainedModel, kind: str) -> None:
    with pytest.raises(ValueError, match="cannot evict; a DMS model accepts a DynamicCache"):
        generate(llama, tokens(1, PROMPT), cache_implementation=kind)


def test_a_cache_filled_by_another_model_is_refused(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        _, cache = feed(build("llama"), tokens(1, 9), [9])
    with pytest.raises(ValueError, match="already holds 9 tokens about which no gate has decided"):
        llama(tokens(1, 3), past_key_values=cache)


def test_another_attention_implementation_is_refused(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="a DMS model runs only with 'dms'"):
        model(tokens(1, 3))


def test_training_mode_cannot_continue_from_a_cache(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    with torch.no_grad():
        _, cache = feed(model, tokens(1, 9), [9])
    with pytest.raises(ValueError, match="call model.eval"):
        model.train()(tokens(1, 3), past_key_values=cache)
    assert model(tokens(1, 9)).logits.requires_grad


def test_stats_count_what_is_really_allocated(llama: PreTrainedModel, storage: str) -> None:
    if storage == "pages":
        pytest.skip("tests/kvcache/test_paged_head_caches.py counts pages")
    with pytest.raises(ValueError, match="has been used yet"):
        kv_stats(copy.deepcopy(build_dms("llama")))
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(tokens(2, 60), past_key_values=cache)
    stats = kv_stats(cache)
    held = [x for layer in cache.layers for x in (*layer.slots.buckets, *layer.slots._undo)]
    assert stats.kv_bytes == sum(x.keys.nbytes + x.values.nbytes for x in held)
    assert stats.dense_bytes == 2 * 60 * 2 * 2 * (8 + 8) * 4  # B, T, layers, K, D of k and v, bytes
    assert [x.resident.tolist() for x in stats.layers] == [
        x.slots.live.tolist() for x in cache.layers
    ]
    assert stats.context_tokens == 60 and 20 < stats.resident_tokens < 45
    assert stats.compression_ratio == pytest.approx(60 / stats.resident_tokens)
    assert f"{stats.compression_ratio:.2f}x" in str(stats)


def test_a_used_model_can_be_copied_and_nothing_stays_staged(llama: PreTrainedModel) -> None:
    generate(llama, tokens(1, PROMPT))
    copied = copy.deepcopy(llama)
    assert torch.equal(generate(copied, tokens(1, 9)), generate(llama, tokens(1, 9)))
    assert not handover._LOCAL.__dict__["staged"]


@pytest.mark.parametrize(
    "facts",
    [{"granularity": "layer"}, {"decision_shift": 1}, {"protect_first": 6}, {"gate": "neuron"}],
)
def test_every_option_means_the_same_in_every_path(facts: dict[str, Any]) -> None:
    model, ids = build_dms("qwen3", **facts), tokens(2, 40)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        for sizes in ([40], [1] * 40, [13, 1, 20, 6]):
            logits, cache = feed(model, ids, sizes)
            assert distance(logits, full) < 1e-5
    first = facts.get("protect_first", 0)
    alone = kv_stats(cache).layers[0].resident
    assert bool((alone < 40).all()) and bool((alone >= first).all())
    if facts.get("granularity") == "layer":
        assert torch.equal(alone[:, 0], alone[:, 1])


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "deepseek_v3"])
def test_a_neuron_needs_a_plain_query_projection(family: str) -> None:
    with pytest.raises(ValueError, match="use dms.gate='adapter'"):
        build_dms(family, gate="neuron")


def test_bfloat16_generates_and_decides_in_float32() -> None:
    model = build_dms("llama").to(torch.bfloat16)
    gate = next(iter(dms_modules(model).values())).dms_gate
    assert gate.logits(torch.randn(1, 3, 32, dtype=torch.bfloat16)).dtype == torch.float32
    assert generate(model, tokens(2, PROMPT)).shape == (2, PROMPT + NEW)
