# SPDX-License-Identifier: Apache-2.0
"""Gates on the residual stream: the same promises as the adapter's, in families whose layers differ most."""

import copy
from pathlib import Path

import pytest
import torch
from families import build, build_dms, distance, eager_copy, feed, frozen_base, tokens

from modelopt_dms.checkpoints.load import load
from modelopt_dms.gates.gate import eviction_off, record_alpha, set_relaxation
from modelopt_dms.modeling.convert import dms_modules

RESIDUAL = ["llama", "gemma3", "phi3", "olmo2", "gpt_neox", "gpt_oss", "deepseek_v3"]


@pytest.mark.parametrize("family", RESIDUAL)
@pytest.mark.parametrize("shift", [0, 1])
@torch.no_grad()
def test_a_residual_gate_decides_the_same_however_the_text_is_fed(family: str, shift: int) -> None:
    model = build_dms(family, gate="residual", decision_shift=shift)
    ids = tokens(2, 24)
    with eviction_off(model):
        untouched = model(ids, use_cache=False).logits
    assert distance(untouched, eager_copy(build(family))(ids, use_cache=False).logits) < 1e-6
    full = model(ids, use_cache=False).logits
    assert distance(full, untouched) > 0.1
    for split in ([24], [1] * 24, [10, 1, 1, 8, 4]):
        assert distance(feed(model, ids, split)[0], full) < 1e-5


@torch.no_grad()
def test_a_residual_gate_reads_what_enters_the_layer_through_its_own_norm() -> None:
    model = build_dms("llama", gate="residual")
    gate = dms_modules(model)["model.layers.1.self_attn"].dms_gate
    gate.norm.normal_()
    ids = tokens(1, 12)
    residual = []
    layer = model.model.layers[1]
    hook = layer.input_layernorm.register_forward_hook(
        lambda m, args, out: residual.append(args[0])
    )
    with record_alpha(model) as record:
        model(ids, use_cache=False)
    hook.remove()
    x = residual[0].double()
    normed = x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    z = gate.scale * (normed * gate.norm.double()) @ gate.weight.double().T - gate.offset
    expected = z.transpose(1, 2) > gate.threshold.double()[:, None]
    assert torch.equal(record.hard[1], expected)
    assert 0 < expected.float().mean() < 1


def test_a_residual_gate_reads_where_attention_computes() -> None:
    # Where layers lie on several devices, the layer's hook runs before accelerate has moved what enters it.
    model = build_dms("llama", gate="residual")
    gate, layer = dms_modules(model)["model.layers.1.self_attn"].dms_gate, model.model.layers[1]
    gate._see(layer, (torch.randn(1, 3, 64),), {})
    found = gate.read((torch.empty(1, 3, 64, device="meta"),), {})
    gate.clear()
    assert found.device.type == "meta"


def test_a_residual_gate_learns_also_under_checkpointing_and_keeps_nothing() -> None:
    model = build_dms("llama", gate="residual").train()
    set_relaxation(model, 3, tau=1.0)
    ids = tokens(2, 16)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with frozen_base(model) as parameters:
            model(ids, use_cache=False).logits.square().mean().backward()
            found.append([x.grad.clone() for x in parameters])
    assert len(found[0]) == 4  # a weight and a norm in each of two layers
    for plain, recomputed in zip(*found, strict=True):
        assert bool((plain != 0).any())
        assert torch.equal(plain, recomputed)
    copied = copy.deepcopy(model).eval()
    model.eval()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        for module in dms_modules(model).values():
            module.dms_gate.norm.zero_()
        # The copy's hooks feed the copy's gates.
        assert torch.equal(copied(ids, use_cache=False).logits, before)


@torch.no_grad()
def test_a_residual_gate_survives_saving(tmp_path: Path) -> None:
    model = build_dms("qwen3", gate="residual", decision_shift=1)
    for module in dms_modules(model).values():
        module.dms_gate.norm.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    ids = tokens(2, 24)
    expected = model(ids, use_cache=False).logits
    assert torch.equal(load(tmp_path)(ids, use_cache=False).logits, expected)
