# SPDX-License-Identifier: Apache-2.0
"""train='lora': adapters learn beside the gates, are merged at the end, and are gone after an error."""

import pytest
import torch
from families import FAMILIES, build, tokens
from training_runs import assert_same, make_config, make_model, run

import modelopt_dms as dms
from modelopt_dms.config.recipe import Recipe
from modelopt_dms.gates.gate import eviction_off, gate_parameters
from modelopt_dms.modeling.convert import dms_modules
from modelopt_dms.training.distill import Distiller, learning
from modelopt_dms.training.lora import LoraError, adapted
from modelopt_dms.training.trainer import RetrofitTrainer

PROJECTIONS = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "dense"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
}
LORA = {"train": "lora", "lora_rank": 4, "lora_alpha": 8.0, "learning_rate": 5e-3}


def base_weights(model):
    gates = {name for name, _ in gate_parameters(model)}
    return {k: x.detach().clone() for k, x in model.named_parameters() if k not in gates}


def test_base_weights_learn_and_no_adapter_stays():
    model = make_model()
    before = base_weights(model)
    flags = {k: x.requires_grad for k, x in model.named_parameters()}
    run(model, make_config(**LORA))
    after = base_weights(model)
    assert after.keys() == before.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if "_proj" in k}
    assert {k: x.requires_grad for k, x in model.named_parameters()} == flags


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_fit_every_family_and_the_teacher_is_the_untouched_model(family):
    model = dms.apply_dms(build(family), {"window": 4, "scale": 10.0})
    ids = tokens(2, 16)
    with torch.no_grad(), eviction_off(model):
        original = model(ids, use_cache=False).logits
    config = make_config(**LORA)
    with adapted(model, config), learning(model, config):
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.1)
        distiller = Distiller(model, config)
        batch = {"input_ids": ids, "position_ids": torch.arange(16).expand(2, -1)}
        batch["tokens_ahead"] = 15 - batch["position_ids"]
        with torch.no_grad():
            kl = distiller.eval()(**batch, target=0.0, noise_seed=None)["kl"]
            changed = model(ids, use_cache=False).logits
    assert kl > 1e-3, "the student has adapters, the teacher has not"
    with torch.no_grad(), eviction_off(model):
        merged = model(ids, use_cache=False).logits
    assert not torch.equal(merged, original)
    torch.testing.assert_close(merged, changed, atol=1e-4, rtol=1e-4)


def test_adapters_of_a_bfloat16_model_take_steps_that_bfloat16_would_lose():
    model = dms.apply_dms(build("llama").to(torch.bfloat16), {"window": 4})
    ids = tokens(2, 16)
    config = make_config(**LORA)
    with adapted(model, config), learning(model, config):
        adapters = {k: p for k, p in model.named_parameters() if ".lora_A." in k}
        assert {p.dtype for p in adapters.values()} == {torch.float32}
        before = {k: p.detach().clone() for k, p in adapters.items()}
        for p in adapters.values():
            p.data += 1e-5 * p.sign()  # a step of AdamW at a learning rate of 1e-5
        moved = sum(int((p != before[k]).sum()) for k, p in adapters.items())
        assert moved == sum(p.numel() for p in adapters.values())
        assert model(ids, use_cache=False).logits.dtype == torch.bfloat16


def test_an_error_leaves_the_base_model_as_it_was(monkeypatch):
    model = make_model()
    before = base_weights(model)

    def fail(self, *args, **kwargs):
        for name, parameter in self.distiller.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_()
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(RetrofitTrainer, "compute_loss", fail)
    with pytest.raises(FloatingPointError):
        run(model, make_config(**LORA))
    after = base_weights(model)
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    config = make_config(**LORA)
    whole = run(config=config)
    real, count = RetrofitTrainer.compute_loss, [0]

    def stop(self, *args, **kwargs):
        count[0] += 1
        if count[0] > 5:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RetrofitTrainer, "compute_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config=config, output_dir=tmp_path)
    torch.manual_seed(99)  # initial adapters must not depend on it
    resumed = run(config=config, output_dir=tmp_path)
    assert_same(whole, resumed)
    one, other = base_weights(whole[0]), base_weights(resumed[0])
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3", "deepseek_v3"])
def test_attention_means_the_linear_layers_of_layers_with_a_gate(family):
    model = dms.apply_dms(build(family), {"window": 4})
    config = make_config(**LORA, lora_modules=["attention"])
    linear = {
        f"{name}.{inner}"
        for name, module in dms_modules(model).items()
        for inner, layer in module.named_modules()
        if inner and inner.rpartition(".")[2] in PROJECTIONS
    }
    with adapted(model, config), learning(model, config):
        found = {k.partition(".lora_")[0] for k, _ in model.named_parameters() if ".lora_" in k}
    assert found == linear and len(linear) >= 2 * len(dms_modules(model))


def test_modules_that_do_not_exist_are_refused_and_nothing_changes():
    model = make_model()
    before = base_weights(model)
    with pytest.raises(LoraError, match=r"retrofit.lora_modules=\['qproj'\]"):
        run(model, make_config(**LORA, lora_modules=["qproj"]))
    assert base_weights(model).keys() == before.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dms": {"gate": "neuron"}}, "use retrofit.train='all'"),
        (
            {"quantize": {"order": "before_retrofit", "quant_cfg": []}},
            "use quantize.order='after_retrofit'",
        ),
        ({"retrofit": {"train": "lora", "sharding": "fsdp2"}}, "sharding='none'"),
    ],
    ids=str,
)
def test_what_adapters_cannot_do_is_refused_by_the_recipe(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"dms": {}, "retrofit": {"train": "lora"}, **changes})
