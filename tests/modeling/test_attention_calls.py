# SPDX-License-Identifier: Apache-2.0
"""Around a layer's attention: who runs it, with which masks and arguments, in which thread and on which device."""

import copy
import io
import pickle
import threading
from typing import Any

import families
import modelopt.torch.quantization as mtq
import pytest
import torch
import transformers
from accelerate import cpu_offload
from families import WINDOW, build, build_dms, distance, eager_copy, feed, open_gates, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from modelopt_dms.checkpoints.load import load
from modelopt_dms.gates.gate import eviction_off, gates
from modelopt_dms.kernels import dispatch
from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.modeling.convert import UnsupportedModelError, dms_modules
from modelopt_dms.modeling.dms_cache import DMSCache
from modelopt_dms.modeling.masks import MaskError
from modelopt_dms.modeling.mode import apply_dms
from modelopt_dms.modeling.staging import gate_device

SIZES = {**families.SIZES, "vocab_size": 80, "initializer_range": 0.2}
LARGE_WINDOW = {"window": 512}


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build_dms("llama")


@pytest.fixture(scope="module")
def untrained() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and the same with gates that evict nothing."""
    plain = build("llama")
    return plain, apply_dms(copy.deepcopy(plain), LARGE_WINDOW)


@torch.no_grad()
def test_a_vision_tower_keeps_its_attention() -> None:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        initializer_range=0.2,
    )
    text = transformers.LlamaConfig(**SIZES)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=70)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = tokens(2, 12)
    ids[:, 2:6] = 70
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    expected = eager_copy(model)(**inputs).logits
    apply_dms(model, LARGE_WINDOW)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert distance(model(**inputs).logits, expected) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_layer_without_a_gate_keeps_its_sparse_attention(implementation: str) -> None:
    torch.manual_seed(0)
    config = transformers.MiniMaxM3VLTextConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        dense_intermediate_size=32,
        shared_intermediate_size=16,
        rotary_dim=8,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=1,
        index_local_blocks=1,
        layer_types=["full_attention", "minimax_m3_sparse"],
    )
    model = transformers.MiniMaxM3VLForCausalLM(config).eval()
    model.set_attn_implementation(implementation)
    ids = tokens(2, 24)
    expected = eager_copy(model)(ids, use_cache=False).logits
    apply_dms(model, LARGE_WINDOW)
    assert len(dms_modules(model)) == 1
    assert distance(model(ids, use_cache=False).logits, expected) < 1e-5


@pytest.mark.parametrize(
    "name", ["block_indices", "position_bias", "sinks", "cu_seq_lens_q", "sliding_window"]
)
def test_an_argument_that_dms_does_not_implement_is_refused(
    llama: PreTrainedModel, name: str
) -> None:
    with pytest.raises(ValueError, match=f"layer 0 .LlamaAttention. passes {name} to"):
        llama(tokens(1, 9), use_cache=False, **{name: torch.ones(1)})
    assert llama(tokens(1, 9), use_cache=False, **{name: None}).logits.shape == (1, 9, 64)


@torch.no_grad()
def test_masks_that_dms_would_change_are_refused(untrained: tuple[Any, Any]) -> None:
    model, ids = untrained[1], tokens(1, 20)
    lowest = torch.finfo(torch.float32).min
    biased = torch.zeros(1, 1, 20, 20).masked_fill(~causal(20), lowest) + 0.5 * causal(20)
    prefix = causal(20).clone()
    prefix[..., :8, :8] = True
    for mask, what in [
        (biased, "adds a finite bias"),
        (prefix, "lets a token see later ones"),
        (causal(20).expand(1, 4, -1, -1), "has shape"),
    ]:
        for use_cache in (False, True):
            with pytest.raises(MaskError, match=f"layer 0 .LlamaAttention.: attention_mask {what}"):
                model(ids, attention_mask=mask, use_cache=use_cache)
    past = torch.ones(1, 20, dtype=torch.long)
    past[0, 3:6] = 0
    _, cache = feed(model, ids[:, :19], [19])
    with pytest.raises(MaskError, match="hides cached tokens"):
        model(ids[:, 19:], attention_mask=past, past_key_values=cache)


@torch.no_grad()
def test_causal_padded_and_packed_masks_are_the_plain_model(untrained: tuple[Any, Any]) -> None:
    plain, model = untrained
    ids = tokens(2, 20)
    packed = causal(20).clone()
    packed[..., 8:, :8] = False
    padding = torch.ones(2, 20, dtype=torch.long)
    padding[0, :5] = 0
    for mask in (None, causal(20), packed, padding):
        for dtype in (torch.bool, torch.float32):
            given = mask
            if mask is not None and mask.ndim == 4 and dtype == torch.float32:
                given = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
            expected = plain(ids, attention_mask=given, use_cache=False).logits[:, 5:]
            assert distance(model(ids, attention_mask=given).logits[:, 5:], expected) < 1e-5
    first = model(ids[:, :12], attention_mask=padding[:, :12])
    then = model(ids[:, 12:], attention_mask=padding, past_key_values=first.past_key_values).logits
    expected = plain(ids, attention_mask=padding, use_cache=False).logits[:, 12:]
    assert distance(then, expected) < 1e-5
    with pytest.raises(MaskError, match="hides cached tokens, or shows their padding"):
        more = torch.ones(2, 22, dtype=torch.long)
        model(ids[:, :2], attention_mask=more, past_key_values=first.past_key_values)


def in_threads(model: PreTrainedModel, prompts: list[Tensor], new: int) -> list[Any]:
    out: list[Any] = [None] * len(prompts)

    def work(i: int) -> None:
        mask = torch.ones_like(prompts[i])
        out[i] = model.generate(prompts[i], attention_mask=mask, max_new_tokens=new)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def check_at_once(model: PreTrainedModel, times: int) -> list[Tensor]:
    """Compare two `generate` at once with two in turn, several times; returns the prompts."""
    prompts = [tokens(1, 40, seed=1), tokens(1, 30, seed=2)]
    expected = [model.generate(x, max_new_tokens=24) for x in prompts]
    for _ in range(times):
        for out, wanted in zip(in_threads(model, prompts, 24), expected, strict=True):
            assert out is not None and torch.equal(out, wanted)
    return prompts


@pytest.mark.parametrize(
    "times", [pytest.param(3), pytest.param(200, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("facts", [{}, {"gate": "residual"}, {"gate": "neuron"}], ids=str)
def test_two_generates_at_once_equal_two_in_turn(facts: dict[str, Any], times: int) -> None:
    model = build_dms("llama", **facts)
    model.generate(tokens(1, 30, seed=2), max_new_tokens=24)
    stats = str(kv_stats(model))
    prompts = check_at_once(model, times)
    model.generate(prompts[1], max_new_tokens=24)
    assert str(kv_stats(model)) == stats


@pytest.mark.parametrize("preset", ["FP8_KV_CFG", "INT8_DEFAULT_CFG"])
def test_two_generates_at_once_of_a_quantized_model_equal_two_in_turn(preset: str) -> None:
    config = {"quant_cfg": copy.deepcopy(getattr(mtq, preset)["quant_cfg"]), "algorithm": "max"}
    check_at_once(mtq.quantize(build_dms("llama"), config, lambda x: x(tokens(4, 32))), 3)


@pytest.mark.parametrize("facts", [{}, {"gate": "residual"}, {"gate": "neuron"}], ids=str)
@torch.no_grad()
def test_offloaded_weights_decide_the_same(facts: dict[str, Any]) -> None:
    model, ids = build_dms("llama", **facts), tokens(2, 24)
    expected = model(ids, use_cache=False).logits
    written = model.generate(ids, max_new_tokens=6)
    cpu_offload(model, execution_device="cpu")
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    for _ in range(2):
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=6), written)


@torch.no_grad()
def test_a_gate_of_an_offloaded_layer_is_made_with_values() -> None:
    model = build("llama")
    cpu_offload(model, execution_device="cpu")
    apply_dms(model, LARGE_WINDOW)
    assert not any(x.is_meta for gate in gates(model) for x in gate.state_dict().values())
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(build("llama").config)
    apply_dms(empty, LARGE_WINDOW)
    assert not any(gate.weight.is_meta for gate in gates(empty))
    assert gate_device(empty.model.layers[0].self_attn).type == "cpu"


def test_a_gate_without_values_is_refused(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    gates(model)[1].to("meta")
    with pytest.raises(RuntimeError, match="gate of layer 1 is on the meta device"):
        model(tokens(1, 5))


@torch.no_grad()
def test_a_neuron_gate_reads_an_adapter_of_its_projection() -> None:
    model, ids = build_dms("llama", gate="neuron"), tokens(2, 30)
    before = model(ids, use_cache=False).logits
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    found = adapted(input_ids=ids, use_cache=False).logits
    assert distance(found, before) > 0.1
    merged = adapted.merge_and_unload()
    assert distance(merged(ids, use_cache=False).logits, found) < 1e-4


def parts(model: PreTrainedModel) -> dict[str, Any]:
    """What every module has, and its hooks; ModelOpt notes on the model itself that a mode was tried."""
    named = {key: x for key, x in model.named_modules() if key}
    hooks = {key: (len(x._forward_hooks), len(x._forward_pre_hooks)) for key, x in named.items()}
    return {key: (set(vars(x)), set(x._modules), hooks[key]) for key, x in named.items()}


@pytest.mark.parametrize("name", ["JetMoeConfig", "DiffLlamaConfig", "HrmTextConfig"])
def test_layers_that_call_attention_in_another_way_are_refused(name: str) -> None:
    sizes = dict(SIZES)
    if name == "JetMoeConfig":
        sizes = {x: y for x, y in sizes.items() if x not in ("head_dim", "num_attention_heads")}
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes))
    before = parts(model)
    with pytest.raises(UnsupportedModelError, match=r"calls attention in a way that DMS does not"):
        apply_dms(model, LARGE_WINDOW)
    assert parts(model) == before
    assert model.config._attn_implementation != "dms"
    assert model(tokens(1, 5)).logits.shape == (1, 5, 80)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_cast_leaves_gates_in_float32(llama: PreTrainedModel, cast: str) -> None:
    model = getattr(copy.deepcopy(llama), cast)()
    assert model.dtype != torch.float32
    for gate, wanted in zip(gates(model), gates(llama), strict=True):
        for key, x in gate.state_dict().items():
            assert x.dtype == torch.float32 and torch.equal(x, wanted.state_dict()[key])


def test_autocast_does_not_round_what_a_gate_computes(llama: PreTrainedModel) -> None:
    gate, hidden = gates(llama)[0], torch.randn(1, 9, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate.logits(hidden), gate.logits(hidden).float())
        rounded = gate.logits(hidden)
    assert torch.equal(rounded, gate.logits(hidden))


@pytest.mark.parametrize("draft", [24, 25, 64])
def test_drafts_as_long_as_documented_can_be_taken_back(llama: PreTrainedModel, draft: int) -> None:
    ids = tokens(1, 20).repeat(1, 5)
    out = llama.generate(ids, prompt_lookup_num_tokens=draft, max_new_tokens=30)
    assert torch.equal(out, llama.generate(ids, max_new_tokens=30))


@torch.no_grad()
def test_a_crop_beyond_the_length_empties_a_cache(llama: PreTrainedModel) -> None:
    ids = tokens(1, 100)
    expected, cache = feed(llama, ids, [100])
    cache.crop(-400)
    assert cache.get_seq_length() == 0
    assert torch.equal(feed(llama, ids, [100], cache)[0], expected)


@torch.no_grad()
def test_what_a_dms_cache_cannot_do_is_one_clear_error(llama: PreTrainedModel) -> None:
    _, cache = feed(llama, tokens(2, 9), [9])
    for name in ("keys", "values"):
        with pytest.raises(AttributeError, match="every head keeps tokens of its own"):
            getattr(cache.layers[0], name)
    with pytest.raises(ValueError, match="3 sequences do not fit a cache that holds 2"):
        llama(tokens(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="output_attentions=True: a DMS model never has"):
        llama(tokens(1, 5), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions=True: a DMS model never has"):
        llama.generate(tokens(1, 5), output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no language-model head"):
        apply_dms(build("llama").model, LARGE_WINDOW)


@pytest.mark.parametrize("facts", [{}, {"gate": "residual"}, {"gate": "neuron"}], ids=str)
@torch.no_grad()
def test_a_model_survives_pickle_and_torch_save(facts: dict[str, Any]) -> None:
    model, ids = build_dms("llama", **facts), tokens(2, 24)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        for options in ({"use_cache": False}, {"use_cache": True}):
            assert torch.equal(again(ids, **options).logits, model(ids, **options).logits)


@torch.no_grad()
def test_a_loaded_model_with_a_layer_on_disk_decides_the_same(tmp_path: Any) -> None:
    model, ids = (
        open_gates(apply_dms(build("llama"), {"window": WINDOW, "scale": 10.0})),
        tokens(2, 24),
    )
    model.save_pretrained(tmp_path)
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    loaded = load(tmp_path, device_map=places)
    assert distance(loaded(ids).logits, model(ids).logits) < 1e-6


@torch.no_grad()
def test_the_cache_of_a_model_with_another_window_is_refused() -> None:
    ids = tokens(1, 20)
    cache = build_dms("llama", window=9)(ids[:, :12]).past_key_values
    model = build_dms("llama", window=4)
    with pytest.raises(ValueError, match="a delay window of 9 tokens, and the model's is 4"):
        model(ids[:, 12:], past_key_values=cache)


def test_the_cache_of_a_model_whose_decisions_are_shifted_is_refused(
    llama: PreTrainedModel,
) -> None:
    cache = cache_from(
        build_dms("llama", window=llama.config.dms_config["window"], decision_shift=1)
    )
    with pytest.raises(ValueError, match="has decision_shift=1, and the model's is 0"):
        llama(tokens(1, 20)[:, 12:], past_key_values=cache)


def cache_from(model: PreTrainedModel) -> Any:
    with torch.no_grad():
        return model(tokens(1, 12)).past_key_values


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 4}, "a model with 4 layers, and this one has 2"),
        ({"num_hidden_layers": 1}, "a model with 1 layers, and this one has 2"),
        (
            {"num_key_value_heads": 4},
            r"4 KV heads of 8 \(keys\).*, and the model gives it 2 KV heads of 8",
        ),
        ({"head_dim": 16}, r"2 KV heads of 16 \(keys\).*, and the model gives it 2 KV heads of 8"),
    ],
)
def test_the_cache_of_a_model_with_other_layers_or_heads_is_refused(
    llama: PreTrainedModel, other: dict[str, int], message: str
) -> None:
    for run in (llama, llama.generate):
        cache = cache_from(build_dms("llama", base=other))
        with pytest.raises(ValueError, match=message):
            run(tokens(1, 20)[:, 12:] if run is llama else tokens(1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match="layers, and this one has|KV heads of"):
        paged = DMSCache(build_dms("llama", base=other), batch_size=1, max_length=64)
        build_dms("llama", base=other)(tokens(1, 12), past_key_values=paged)
        llama(tokens(1, 20)[:, 12:], past_key_values=paged)


def test_a_model_without_gates_is_not_given_a_dms_cache(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="a layer without a gate gave its tokens to a DMS cache"):
        build("llama")(tokens(1, 1), past_key_values=cache_from(llama))


def test_a_model_made_from_a_dms_models_config_does_not_run_without_gates(
    llama: PreTrainedModel,
) -> None:
    bare = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(llama.config))
    assert bare.config._attn_implementation == "dms"
    with pytest.raises(ValueError, match="attn_implementation='dms', but its model has no gates"):
        bare(tokens(1, 5))


@torch.no_grad()
def test_padding_between_the_tokens_of_a_sequence_is_refused(llama: PreTrainedModel) -> None:
    """The delay window would count it: the answer would not be that of the sequence alone."""
    cache = cache_from(llama)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[:, 12:15] = 0  # a second turn, padded on the left
    with pytest.raises(MaskError, match="padding between the tokens"):
        llama(tokens(1, 8), attention_mask=mask, past_key_values=cache)
    right = torch.tensor([[1] * 9 + [0] * 3])
    cache = llama(tokens(1, 12), attention_mask=right).past_key_values
    with pytest.raises(MaskError, match="padding between the tokens"):
        positions = torch.arange(9, 11)[None]
        both = torch.cat([right, torch.ones(1, 2, dtype=torch.long)], dim=1)
        llama(tokens(1, 2), attention_mask=both, position_ids=positions, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("value", [0, 1])
def test_a_mask_of_the_new_tokens_alone_is_refused(llama: PreTrainedModel, value: int) -> None:
    mask = torch.full((1, 5), value)
    with pytest.raises(MaskError, match="must cover the cached ones"):
        llama(tokens(1, 5), attention_mask=mask, past_key_values=cache_from(llama))


def test_a_teacher_over_packed_documents_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It repeats no keys, reads no mask of T x T, and is the plain model."""
    ids, packed = tokens(2, 40), torch.ones(40, 40, dtype=torch.bool).tril()[None, None].clone()
    packed[..., 16:, :16] = False
    plain, model = build("qwen3"), build_dms("qwen3")
    calls: list[torch.Size] = []
    kernel = dispatch.library.prefill

    def counted(q: Tensor, *arguments: Any) -> Any:
        calls.append(q.shape)
        return kernel(q, *arguments)

    monkeypatch.setattr(dispatch, "choose", lambda impl, device: "triton")
    monkeypatch.setattr(dispatch.library, "prefill", counted)
    with torch.no_grad(), eviction_off(model):
        found = model(ids, attention_mask=packed, use_cache=False).logits
        assert len(calls) == len(dms_modules(model))
        torch.testing.assert_close(
            found, plain(ids, attention_mask=packed, use_cache=False).logits, rtol=0, atol=1e-5
        )
        model(ids, use_cache=False)  # causal: SDPA repeats nothing
    assert len(calls) == len(dms_modules(model))
