# SPDX-License-Identifier: Apache-2.0
"""The embedded model, calibrated: it remembers what a window forgets, and is tuned to a budget on text."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modelopt_dms as dms
from modelopt_dms.config.bundled import embedded_model_dir
from modelopt_dms.evaluation import peers, tuning
from modelopt_dms.evaluation.measure import measure
from modelopt_dms.evaluation.score import perplexity
from modelopt_dms.evaluation.tasks import held_out_text, training_documents
from modelopt_dms.gates.thresholds import thresholds_of

LENGTH = 512


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_dir())


@pytest.fixture(scope="module")
def text(tokenizer):
    return held_out_text(tokenizer, LENGTH, 4, 0)


@pytest.fixture(scope="module")
def model(tokenizer):
    """The embedded model after a few seconds of calibration."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    dms.apply_dms(model, {"window": 48, "scale": 10.0, "target_cr": 4.0})
    data = [x.ids for x in training_documents(tokenizer, 28, LENGTH, 0)]
    config = {"samples": 20, "sample_length": LENGTH, "batch_size": 4, "curve": [2.0, 4.0, 8.0]}
    dms.calibrate(model.eval(), config, data=data, progress=False)
    return model


@pytest.mark.parametrize("task", ["recall", "tracking", "arithmetic"])
def test_it_answers_from_what_calibrated_gates_kept_and_a_window_of_equal_budget_does_not(
    model, tokenizer, task
):
    dms.set_compression(model, 4.0)
    ours = measure(model, tokenizer, task, LENGTH, 2, 0)
    window = peers.sliding_window(model, ours.end.resident_tokens)
    assert ours.end.compression_ratio > 3.0
    assert ours.value > 0.9
    assert measure(window, tokenizer, task, LENGTH, 2, 0).value < 0.6


def test_tune_takes_the_largest_ratio_within_the_budget(model, text):
    worst = dms.tune(model, data=text, max_loss=1e6)
    assert len(worst.trials) == 1 and worst.chosen == worst.trials[0]
    assert worst.chosen.loss > 0 and worst.samples == 4 and worst.length == LENGTH
    last = 0.0
    for budget in (0.0, worst.chosen.loss / 4, worst.chosen.loss / 2):
        found = dms.tune(model, data=text, max_loss=budget)
        assert len(found.trials) == tuning.HALVINGS + 1
        assert found.chosen.loss <= budget
        larger = [x for x in found.trials if x.evicted_fraction > found.chosen.evicted_fraction]
        assert larger and all(x.loss > budget for x in larger)
        assert last <= found.chosen.compression_ratio < worst.chosen.compression_ratio
        last = found.chosen.compression_ratio
    assert last > 1.5


def test_tune_leaves_the_model_at_what_it_chose(model, text):
    found = dms.tune(model, data=text, max_loss=1.0)
    assert perplexity(model, text).value == pytest.approx(found.chosen.perplexity, rel=1e-6)
    before = thresholds_of(model)
    dms.set_compression(model, 2.0)
    assert dms.tune(model, data=text, max_loss=1.0) == found
    assert thresholds_of(model) == before


@pytest.mark.parametrize("budget", [-1, float("nan")])
def test_tune_refuses_a_budget_that_no_setting_keeps(budget, model, text):
    with pytest.raises(ValueError, match=f"max_loss={budget}"):
        dms.tune(model, data=text, max_loss=budget)
