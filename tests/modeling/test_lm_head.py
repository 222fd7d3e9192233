# SPDX-License-Identifier: Apache-2.0
"""Logits of slices equal the model's own, and packed documents do not see each other."""

import pytest
import torch
from families import FAMILIES, SPECIAL_TOKENS, VOCABULARY, build
from transformers import CohereConfig, CohereForCausalLM

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.gates.gate import eviction_off
from modelopt_dms.modeling.convert import dms_modules
from modelopt_dms.modeling.lm_head import UnsupportedHeadError, check_head, last_hidden, output_head
from modelopt_dms.modeling.mode import apply_dms

# Families whose logits are more than a projection, with values that make it show.
HEADS = {
    "gemma2": {"final_logit_softcapping": 0.05},
    "granite": {"logits_scaling": 7.0},
}


def make_model(kind="llama"):
    if kind == "cohere":
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "logit_scale": 0.3}
        config = CohereConfig(vocab_size=VOCABULARY, **sizes, **heads, **SPECIAL_TOKENS)
        model = CohereForCausalLM(config)
    else:
        model = build(kind, **HEADS.get(kind, {}))
    return apply_dms(model, DMSConfig(window=3)).eval()


@pytest.mark.parametrize("kind", [*FAMILIES, "cohere"])
def test_head_of_hidden_states_equals_the_models_logits(kind):
    model = make_model(kind)
    ids, positions = torch.randint(1, VOCABULARY, (2, 9)), torch.arange(9).expand(2, 9)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = output_head(model)(last_hidden(model, ids, positions))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    check_head(model)


@pytest.mark.parametrize("kind", [*FAMILIES, "cohere"])
def test_packed_documents_have_the_logits_they_have_alone(kind):
    """Also with every token marked for eviction: the window does not reach over the border."""
    model = make_model(kind)
    torch.manual_seed(1)
    lengths = (7, 1, 5, 9)
    documents = [torch.randint(1, VOCABULARY, (1, n)) for n in lengths]
    positions = [torch.arange(n)[None] for n in lengths]
    for module in dms_modules(model).values():
        module.dms_gate.threshold.fill_(-100.0)
    with torch.no_grad():
        alone = [last_hidden(model, *pair) for pair in zip(documents, positions, strict=True)]
        packed = last_hidden(model, torch.cat(documents, 1), torch.cat(positions, 1))
        with eviction_off(model):
            kept = last_hidden(model, torch.cat(documents, 1), torch.cat(positions, 1))
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-6)
    assert (packed - kept).abs().max() > 1e-4


def test_a_head_that_is_more_than_its_output_embeddings_is_refused():
    model = make_model()
    model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits + 1.0))
    with pytest.raises(UnsupportedHeadError, match="logits of LlamaForCausalLM are not"):
        check_head(model)


def test_a_model_that_mixes_packed_documents_is_refused():
    """gpt-oss does not look at position_ids when it makes its masks: without ours, documents mix."""
    model = make_model("gpt_oss")
    decoder = model.get_decoder()

    def ignore_borders(module, args, kwargs):
        return args, {**kwargs, "attention_mask": None}

    decoder.register_forward_pre_hook(ignore_borders, with_kwargs=True)
    with pytest.raises(UnsupportedHeadError, match="does not keep packed documents apart"):
        check_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_leak_in_one_layer_of_many_is_refused(dtype):
    """A shift along the sequence, as convolutions have, that does not stop at a border."""
    model = apply_dms(build("llama", num_hidden_layers=8).to(dtype), DMSConfig(window=3)).eval()
    model.get_decoder().layers[4].mlp.register_forward_hook(
        lambda module, args, out: out + 0.2 * args[0].roll(1, dims=1)
    )
    with pytest.raises(UnsupportedHeadError, match="does not keep packed documents apart"):
        check_head(model)


def test_kernels_that_round_by_shape_are_no_leak():
    """Massive activations in bfloat16: where another length takes another kernel, right results differ by over 5 %."""
    model = apply_dms(build("llama").to(torch.bfloat16), DMSConfig(window=3)).eval()

    def round_by_shape(module, args, out):
        generator = torch.Generator().manual_seed(out.shape[1])
        noise = torch.randn(out.shape[1:], generator=generator).to(out.dtype)
        return out + 0.1 * out.std() * noise

    model.get_input_embeddings().register_forward_hook(round_by_shape)
    ids, positions = torch.arange(8)[None], torch.arange(8)[None]
    with torch.no_grad():
        packed = last_hidden(model, ids, torch.cat([positions[:, :3], positions[:, :5]], dim=1))
        alone = last_hidden(model, ids[:, 3:], positions[:, :5])
    assert (packed[:, 3:] - alone).double().norm() > 0.05 * alone.double().norm()
    check_head(model)


def test_chance_in_the_forward_pass_is_refused():
    model = make_model()
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: torch.dropout(out, 0.5, True)
    )
    with pytest.raises(UnsupportedHeadError):
        check_head(model)


def test_chance_that_spares_the_check_of_the_head_is_named():
    """Equal runs that give other numbers are chance, and no leak."""
    model, calls = make_model(), []

    def jitter(module, args, out):
        calls.append(0)
        return out if len(calls) <= 2 else out + torch.randn_like(out)

    model.get_input_embeddings().register_forward_hook(jitter)
    with pytest.raises(UnsupportedHeadError, match="other chance in its forward pass"):
        check_head(model)


def test_weights_that_are_not_finite_are_named():
    model = make_model()
    model.get_decoder().layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite: model\.layers\.1\.mlp\.up_proj\.w"):
        check_head(model)


@pytest.mark.parametrize("place", ["decoder", "head"])
def test_an_overflow_in_float16_is_called_one(place):
    model = make_model().to(torch.float16)
    if place == "decoder":
        weight = model.get_decoder().layers[0].mlp.down_proj.weight
    else:
        weight = model.get_output_embeddings().weight
    weight.data.fill_(6e4)
    with pytest.raises(FloatingPointError, match="not finite .* in float16; use bfloat16"):
        check_head(model)
