# SPDX-License-Identifier: Apache-2.0
"""retrofit.cr_range: every step trains for a ratio of its own, and one model serves them all."""

import math

import pytest
import torch
from calibrations import CONFIG, LENGTH, calibrated, converted, documents
from hypothesis import given
from hypothesis import strategies as st

import modelopt_dms as dms
from modelopt_dms.config.recipe import Recipe
from modelopt_dms.gates.curve import CompressionError
from modelopt_dms.gates.gate import gates
from modelopt_dms.gates.thresholds import curve_of
from modelopt_dms.training.progress import drawn_cr
from modelopt_dms.training.trainer import RetrofitTrainer

RETROFIT = {
    "steps": 8,
    "sequence_length": LENGTH,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "cr_range": [1.5, 6.0],
    "logging_steps": 1,
}


@given(st.integers(0, 10**6), st.floats(1.01, 4), st.floats(4.5, 64), st.integers(0, 99))
def test_a_drawn_ratio_is_within_the_range_and_always_the_same(step, lowest, highest, seed):
    found = drawn_cr(step, lowest, highest, seed)
    assert lowest <= found <= highest * (1 + 1e-12)
    assert found == drawn_cr(step, lowest, highest, seed)


def test_draws_are_uniform_in_the_logarithm():
    logs = torch.tensor([math.log2(drawn_cr(step, 2.0, 16.0, 0)) for step in range(2000)])
    counts = torch.histc(logs, bins=3, min=1, max=4)
    assert (counts / 2000 - 1 / 3).abs().max() < 0.05


def test_every_step_moves_thresholds_to_its_ratio_and_the_end_is_where_it_began(monkeypatch):
    model, _ = calibrated()
    before = [gate.threshold.clone() for gate in gates(model)]
    curve, moved, real = curve_of(model), [], RetrofitTrainer.compute_loss

    def spy(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        moved.append(gates(model)[0].moved)
        return loss

    monkeypatch.setattr(RetrofitTrainer, "compute_loss", spy)
    result = dms.retrofit(model, dms.RetrofitConfig(**RETROFIT), data=documents(), progress=False)
    wanted = [drawn_cr(step, 1.5, 6.0, 0) for step in range(8)]
    assert [x["target_cr"] for x in result.rows] == pytest.approx(wanted)
    assert moved == [curve.at(cr).shift for cr in wanted]
    # Thresholds that move by so much change how much is evicted: that much is learnt at different ratios.
    evicted = torch.tensor([x["evicted_hard"] for x in result.rows])
    assert torch.corrcoef(torch.stack([evicted, torch.tensor(wanted).log()]))[0, 1] > 0.8
    assert all(gate.moved == 0.0 for gate in gates(model))
    assert all(torch.equal(x, g.threshold) for x, g in zip(before, gates(model), strict=True))


def test_compress_calibrates_then_trains_for_the_range_and_measures_the_curve_again():
    recipe = Recipe(
        dms={"target_cr": 3.0, "window": 6, "scale": 10.0}, calibrate=CONFIG, retrofit=RETROFIT
    )
    model = dms.compress(converted_base(), recipe, data=documents(), progress=False)
    alone = calibrated()[1].curve
    assert curve_of(model) != alone
    for cr in (1.5, 3.0, 5.0):
        assert dms.set_compression(model, cr).compression_ratio == cr


def converted_base():
    from families import build

    return build("llama")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cr_range": [4.0, 2.0]}, "cr_range must be"),
        ({"cr_range": [1.0, 2.0]}, "cr_range must be"),
        ({"cr_range": [2.0, 40.0]}, "beyond what calibrate.curve measures"),
    ],
    ids=str,
)
def test_a_range_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(dms={}, calibrate={}, retrofit={**RETROFIT, **changes})


def test_a_range_needs_calibrated_gates():
    with pytest.raises(ValueError, match="add a section calibrate"):
        Recipe(dms={}, retrofit=RETROFIT)
    with pytest.raises(CompressionError, match="carries no curve"):
        dms.retrofit(converted(), dms.RetrofitConfig(**RETROFIT), data=documents(), progress=False)
