# SPDX-License-Identifier: Apache-2.0
"""Short retrofits of a tiny model."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.gates.gate import gate_parameters
from modelopt_dms.modeling.mode import apply_dms
from modelopt_dms.training.loop import retrofit

VOCABULARY = 40


LENGTH = 32


def plain_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def make_model(**dms):
    dms = {"window": 3, "scale": 100.0, "offset": 2.0, "target_cr": 2.0, **dms}
    return apply_dms(plain_model(), DMSConfig(**dms))


def make_config(**options):
    return RetrofitConfig(
        **{
            "steps": 7,
            "warmup_steps": 1,
            "sequence_length": LENGTH,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_steps": 3,
            **options,
        }
    )


def make_data(count=60):
    """Every second token is token 0: easy to tell apart, so that gates can learn to evict half of all."""
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (count, LENGTH))
    ids[:, ::2] = 0
    return list(ids)


def run(model=None, config=None, **options):
    model = make_model() if model is None else model
    options = {"data": make_data(), "progress": False, **options}
    return model, retrofit(model, make_config() if config is None else config, **options)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in gate_parameters(model)}


def assert_same(one, other):
    """Two (model, result) pairs are the same to the last bit, but for the time they took."""
    first, second = weights(one[0]), weights(other[0])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one[1].rows == other[1].rows
    assert {**one[1].summary(), "seconds": 0} == {**other[1].summary(), "seconds": 0}
