# SPDX-License-Identifier: Apache-2.0
"""One distillation step: who learns, from whom, and that nothing else changes."""

import copy

import pytest
import torch
from families import FAMILIES, build_dms
from transformers import LlamaConfig, LlamaForCausalLM

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.gates.gate import gate_parameters, gates
from modelopt_dms.modeling.mode import apply_dms
from modelopt_dms.training.distill import Distiller, learning, noise_seed


def make_model(**dms):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.5,
        initializer_range=0.2,
    )
    dms = {"window": 3, "scale": 10.0, "offset": 1.0, "target_cr": 2.0, **dms}
    model = apply_dms(LlamaForCausalLM(config), DMSConfig(**dms))
    for _, parameter in gate_parameters(model):
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def make_config(**options):
    return RetrofitConfig(
        **{"steps": 4, "warmup_steps": 0, "sequence_length": 16, "tau": 0.5, **options}
    )


def make_batch():
    torch.manual_seed(1)
    positions = torch.cat([torch.arange(n) for n in (9, 7, 12, 4)]).view(2, 16)
    ahead = torch.cat([torch.arange(n - 1, -1, -1) for n in (9, 7, 12)] + [torch.full((4,), -1)])
    return {
        "input_ids": torch.randint(61, (2, 16)),
        "position_ids": positions,
        "tokens_ahead": ahead.view(2, 16),
    }


def step(model, config, seed=5, target=0.9, backward=True):
    """Losses and gradients by name of one training step."""
    with learning(model, config):
        distiller = Distiller(model, config).train()
        out = distiller(**make_batch(), target=target, noise_seed=seed)
        if backward:
            out["loss"].backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in out.items()}, gradients


def test_gradients_reach_all_gates_and_nothing_else():
    model = make_model()
    _, gradients = step(model, make_config())
    assert set(gradients) == {name for name, _ in gate_parameters(model)}
    assert all(x.abs().sum() > 0 for x in gradients.values())


def test_training_all_weights_leaves_the_teacher_as_it_was():
    model = make_model()
    config = make_config(train="all")
    with learning(model, config):
        distiller = Distiller(model, config).train()
        before = copy.deepcopy(distiller.copy.state_dict())
        optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], 0.1)
        for seed in (1, 2):
            optimizer.zero_grad()
            distiller(**make_batch(), target=0.9, noise_seed=seed)["loss"].backward()
            optimizer.step()
        assert model.model.embed_tokens.weight.grad.abs().sum() > 0
        after = distiller.copy.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_without_evictions_the_student_is_the_teacher():
    """An untrained gate: alpha is tiny, so the divergence is too. The rate loss is what moves it."""
    model = make_model(offset=50.0)
    out, _ = step(model, make_config())
    assert out["kl"].abs() < 1e-6
    assert out["evicted_soft"] < 1e-6
    assert out["rate"] == pytest.approx(0.9)
    assert out["loss"] == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize("gate", ["adapter", "residual"])
def test_recomputed_activations_give_the_same_losses_and_gradients_bit_for_bit(gate):
    """So the noise is the same in the second run of a layer, and alpha is recorded once, with its gradient."""
    plain, plain_gradients = step(make_model(gate=gate), make_config())
    again, gradients = step(make_model(gate=gate), make_config(gradient_checkpointing=True))
    assert {name: x.tolist() for name, x in plain.items()} == {
        name: x.tolist() for name, x in again.items()
    }
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradient, gradients[name]), name


def test_layers_do_run_twice_when_activations_are_recomputed():
    runs = {}
    for recompute in (False, True):
        model = make_model()
        count = []
        q_proj = model.model.layers[1].self_attn.q_proj
        q_proj.register_forward_hook(lambda *_, c=count: c.append(1))
        step(model, make_config(gradient_checkpointing=recompute))
        runs[recompute] = len(count)
    assert runs == {False: 2, True: 3}  # teacher, student, student again


def test_the_gradient_of_the_rate_loss_alone_moves_gates_under_recomputation():
    for recompute in (False, True):
        model = make_model()
        config = make_config(gradient_checkpointing=recompute)
        with learning(model, config):
            out = Distiller(model, config).train()(**make_batch(), target=0.9, noise_seed=1)
            out["rate"].backward()
            grads = [p.grad for _, p in gate_parameters(model)]
            assert all(x is not None and x.abs().sum() > 0 for x in grads)


def test_noise_depends_on_the_seed_alone():
    model = make_model()
    config = make_config()
    first, again, other = (step(model, config, seed)[0]["loss"] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    seeds = {
        noise_seed(seed, rank, at, micro)
        for seed in range(3)
        for rank in range(3)
        for at in range(3)
        for micro in range(3)
    }
    assert len(seeds) == 81


def test_dropout_stays_off_while_decisions_are_soft():
    """The model's attention_dropout is 0.5; with it, the attention function would refuse to run."""
    model = make_model()
    config = make_config()
    with learning(model, config):
        distiller = Distiller(model, config).train()
        soft = {name for name, module in model.named_modules() if module.training}
        assert soft == {f"model.layers.{i}.self_attn" for i in range(3)}
        assert not any(m.training for m in distiller.eval().modules())
    assert model.model.layers[0].self_attn.attention_dropout == 0.5


def test_everything_but_the_weights_is_as_before_afterwards():
    model = make_model()
    model.model.layers[0].train()
    model.lm_head.weight.requires_grad_(False)

    def state():
        return (
            [p.requires_grad for p in model.parameters()],
            [m.training for m in model.modules()],
            [len(m._forward_hooks) for m in model.modules()],
            [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
            [(gate.noise_seed, gate.enabled, gate.record) for gate in gates(model)],
            model.model.layers[0].self_attn.attention_dropout,
        )

    before = state()
    with (
        pytest.raises(ZeroDivisionError),
        learning(model, make_config(gradient_checkpointing=True)),
    ):
        Distiller(model, make_config()).train()(**make_batch(), target=0.9, noise_seed=1)[
            "loss"
        ].backward()
        raise ZeroDivisionError
    assert state() == before
    assert all(p.grad is None for p in model.parameters())


def test_only_tokens_whose_eviction_takes_effect_are_counted():
    """Window 3: the last four tokens of each document do not count, nor does padding, nor protected tokens."""
    model = make_model(protect_first=1)
    batch = make_batch()
    counted = Distiller(model, make_config()).counted(batch["position_ids"], batch["tokens_ahead"])
    expected = torch.zeros(2, 16, dtype=torch.bool)
    expected[0, 1:5] = expected[0, 10:12] = expected[1, 1:8] = True
    assert torch.equal(counted, expected)


def test_hard_fraction_is_the_share_of_logits_above_the_threshold():
    model = make_model()
    config = make_config()
    batch = make_batch()
    with learning(model, config), torch.no_grad():
        distiller = Distiller(model, config).eval()
        captured = {}
        for gate in gates(model):
            original = gate.logits
            gate.logits = lambda hidden, g=gate, f=original: captured.setdefault(
                g.layer_idx, f(hidden)
            )
        out = distiller(**batch, target=0.0, noise_seed=None)
    counted = distiller.counted(batch["position_ids"], batch["tokens_ahead"])
    shares = [(captured[i] > 0).transpose(1, 2)[counted].float().mean() for i in range(3)]
    torch.testing.assert_close(out["evicted_by_layer"], torch.stack(shares))
    torch.testing.assert_close(out["evicted_hard"], torch.stack(shares).mean())
    assert 0 < out["evicted_hard"] < 1
    assert "loss" not in out


def test_a_shifted_decision_counts_for_the_token_it_governs():
    """Decision shift 1: token j + 1 decides about token j."""
    model = make_model(decision_shift=1)
    config = make_config()
    batch = make_batch()
    with learning(model, config), torch.no_grad():
        out = Distiller(model, config).eval()(**batch, target=0.0, noise_seed=None)
        captured = {}
        for gate in gates(model):
            original = gate.logits
            gate.logits = lambda hidden, g=gate, f=original: captured.setdefault(
                g.layer_idx, f(hidden)
            )
        Distiller(model, config).eval()(**batch, target=0.0, noise_seed=None)
    counted = batch["tokens_ahead"] > 3
    share = torch.stack(
        [(z > 0).roll(-1, 2).transpose(1, 2)[counted].float().mean() for z in captured.values()]
    )
    torch.testing.assert_close(out["evicted_by_layer"], share)


def test_a_gate_without_parameters_of_its_own_needs_all_weights_trained():
    model = make_model(gate="neuron")
    with (
        pytest.raises(ValueError, match="train='gates'.*use train='all'"),
        learning(model, make_config()),
    ):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_every_family_moves_its_gates_only(family):
    """Also with recomputed activations, to the same gradients."""
    model = build_dms(family, window=3, scale=10.0, offset=1.0)
    for _, parameter in gate_parameters(model):
        torch.nn.init.normal_(parameter, std=0.05)
    plain, gradients = step(model, make_config())
    assert set(gradients) == {name for name, _ in gate_parameters(model)}
    assert all(x.abs().sum() > 0 for x in gradients.values())
    assert plain["kl"] > 0
    _, recomputed = step(model, make_config(gradient_checkpointing=True))
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8)
