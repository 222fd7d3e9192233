# SPDX-License-Identifier: Apache-2.0
"""Gates in closed form: they meet the ratio, keep what is needed, and do not care when they are interrupted."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from calibrations import CONFIG, IDS, assert_same, calibrated, converted, documents, gate_state
from families import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import HELPERS
from safetensors import safe_open

import modelopt_dms as dms
from modelopt_dms.calibration import fit, state
from modelopt_dms.calibration.measuring import HeldOut
from modelopt_dms.calibration.run import prepare_calibration
from modelopt_dms.calibration.statistics import Regression
from modelopt_dms.config.calibrate import CalibrateConfig
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.gates.gate import eviction_off, gates
from modelopt_dms.training.checkpoint import ResumeError


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(8, 200),
    width=st.integers(1, 6),
    cuts=st.integers(1, 5),
    ridge=st.sampled_from([1e-6, 1e-3, 0.1]),
)
def test_running_sums_give_the_ridge_regression_of_the_whole(seed, count, width, cuts, ridge):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    y = torch.randn(count, 2, generator=generator) + x[:, :1]
    sums = Regression.empty(width, 2, torch.device("cpu"))
    for part_x, part_y in zip(x.chunk(cuts), y.chunk(cuts), strict=True):
        sums.add(part_x, part_y)
    found = sums.solve(ridge)
    # The same as least squares with rows that pull the weights, not the bias, to 0.
    X = torch.cat([x, torch.ones(count, 1)], 1).double()
    pull = (ridge * x.double().square().sum(0).mean()).sqrt() * torch.eye(width + 1).double()
    pull[-1] = 0
    wanted = torch.linalg.lstsq(
        torch.cat([X, pull]), torch.cat([y.double(), torch.zeros(width + 1, 2).double()])
    ).solution
    torch.testing.assert_close(found.weight, wanted[:-1].T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.bias, wanted[-1], atol=1e-5, rtol=1e-4)
    predicted = X @ wanted
    torch.testing.assert_close(found.variance, predicted.var(0, correction=0), atol=1e-4, rtol=1e-3)
    left = (y - predicted).square().sum(0) / (y.double() - y.double().mean(0)).square().sum(0)
    torch.testing.assert_close(found.explained, 1 - left, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_meets_the_ratio_and_keeps_its_teacher(family):
    model = converted(family)
    with torch.no_grad(), eviction_off(model):
        before = model(IDS, use_cache=False).logits
    result = dms.calibrate(model, CONFIG, data=documents(), progress=False)
    assert result.compression_ratio == pytest.approx(3.0, rel=0.1)
    assert all(0 <= x <= 1 for row in result.explained for x in row)
    with torch.no_grad(), eviction_off(model):
        assert torch.equal(model(IDS, use_cache=False).logits, before)
    generated = model.generate(IDS[:, :20], max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert generated.shape[1] == 60
    assert dms.kv_stats(model).compression_ratio > 1.2


@pytest.mark.parametrize(
    "facts",
    [
        {"gate": "residual"},
        {"gate": "residual", "decision_shift": 1, "granularity": "layer"},
        {"decision_shift": 1},
        {"granularity": "layer"},
        {"protect_first": 4},
    ],
    ids=str,
)
def test_every_kind_of_gate_can_be_calibrated(facts):
    model, result = calibrated(**facts)
    assert result.compression_ratio == pytest.approx(3.0, rel=0.1)
    rows = 1 if facts.get("granularity") == "layer" else 2
    assert [len(x) for x in result.explained] == [rows] * 2


def test_a_gate_learns_what_its_layer_needs():
    """Where the need is a function of what gates read, they explain it: here, one token draws all late attention."""
    model = converted(family="qwen3")
    first, _ = gates(model)
    wanted = 7

    def fake_change(q, k, v, residual, lengths, window, scoring):
        marked = torch.tensor([[t == wanted for t in row] for row in batch["ids"]])
        return marked[:, None].float().expand(-1, k.shape[1], -1)

    batch = {}
    decoder = model.get_decoder()
    forward = decoder.forward

    def remember(input_ids=None, **kwargs):
        batch["ids"] = input_ids.tolist()
        return forward(input_ids=input_ids, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "output_change", fake_change)
        patch.setattr(decoder, "forward", remember)
        result = dms.calibrate(model, {**CONFIG, "curve": [2.0]}, data=documents(), progress=False)
    assert min(result.explained[0]) > 0.5
    ids = torch.full((1, 30), 20)
    ids[0, 5:10] = wanted
    hidden = model.get_input_embeddings()(ids)
    z = first.logits(model.model.layers[0].input_layernorm(hidden))[0]
    assert (z[:, 5:10] < z[:, :5].min()).all(), "needed tokens have the lowest eviction logits"


def test_budgets_are_ragged_or_uniform_as_asked():
    spread = {}
    for budget in ("global", "uniform"):
        model, _ = calibrated(config={"budget": budget})
        facts = DMSConfig(**model.config.dms_config)
        run = prepare_calibration(model, CalibrateConfig(**CONFIG), facts, data=documents())
        above = HeldOut(model, run.data.held_out, length=1, batch_size=4).margins()
        shares = torch.cat([(x > 0).float().mean(1) for x in above])
        spread[budget] = float(shares.max() - shares.min())
    assert 0 < 4 * spread["uniform"] < spread["global"], spread


def test_the_same_seed_gives_the_same_gates_and_another_one_others():
    one, other = calibrated()[0], calibrated()[0]
    assert_same(gate_state(one), gate_state(other))
    another = calibrated(config={"seed": 1})[0]
    assert not torch.equal(gates(one)[0].weight, gates(another)[0].weight)


def test_interrupted_between_forwards_it_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole, _ = calibrated()
    for stop in (1, 2, 3, 5):
        place = tmp_path / str(stop)
        real, count = fit._Observer.observe, [0]

        def broken(self, *args, real=real, count=count, stop=stop):
            count[0] += 1
            if count[0] > 2 * stop:  # two layers
                raise KeyboardInterrupt
            real(self, *args)

        options = {"data": documents(), "output_dir": place, "progress": False}
        model = converted()
        with monkeypatch.context() as patch:
            patch.setattr(fit._Observer, "observe", broken)
            with pytest.raises(KeyboardInterrupt):
                dms.calibrate(model, CONFIG, **options)
        assert all(gate.observer is None and gate.enabled for gate in gates(model))
        assert (place / state.STATE_FILE).exists() == (stop >= 2)
        resumed = converted()
        dms.calibrate(resumed, CONFIG, **options)
        assert_same(gate_state(resumed), gate_state(whole))
        assert resumed.config.dms_curve == whole.config.dms_curve


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
import warnings; warnings.filterwarnings("ignore")
from calibrations import *
from modelopt_dms.calibration import fit
real = fit.save_state
def save(*args):
    real(*args)
    print("saved", flush=True)
fit.save_state = save
model = converted()
dms.calibrate(model, CONFIG, data=documents(), output_dir={place!r}, progress=False)
"""


@pytest.mark.slow
def test_sigkill_leaves_a_calibration_that_goes_on_to_the_same_bits(tmp_path):
    script = SCRIPT.format(tests=str(HELPERS), place=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"saved\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / state.STATE_FILE).exists()
    resumed = converted()
    dms.calibrate(resumed, CONFIG, data=documents(), output_dir=tmp_path, progress=False)
    assert_same(gate_state(resumed), gate_state(calibrated()[0]))


def test_a_resume_with_other_settings_is_refused_and_resume_false_starts_over(tmp_path):
    options = {"output_dir": tmp_path, "progress": False}
    dms.calibrate(converted(), CONFIG, data=documents(), **options)
    with pytest.raises(ResumeError, match="calibrate.seed"):
        dms.calibrate(converted(), {**CONFIG, "seed": 3}, data=documents(), **options)
    with pytest.raises(ResumeError, match="data.digest"):
        dms.calibrate(converted(), CONFIG, data=documents(seed=5), **options)
    model = converted()
    dms.calibrate(model, {**CONFIG, "seed": 3}, data=documents(), resume=False, **options)
    assert_same(gate_state(model), gate_state(calibrated(config={"seed": 3})[0]))
    (tmp_path / state.STATE_FILE).write_bytes(b"x" * 20)
    with pytest.raises(ResumeError, match="cannot be read"):
        dms.calibrate(converted(), CONFIG, data=documents(), **options)


def test_the_state_file_says_what_it_is_of(tmp_path):
    dms.calibrate(converted(), CONFIG, data=documents(), output_dir=tmp_path, progress=False)
    with safe_open(tmp_path / state.STATE_FILE, framework="pt") as stored:
        metadata = stored.metadata()
    assert metadata["done"] == "6"
    assert json.loads(metadata["description"])["calibrate"]["samples"] == 24


@pytest.mark.parametrize(
    ("config", "facts", "data", "message"),
    [
        ({}, {"gate": "neuron"}, None, "gates with weights of their own"),
        ({"sample_length": 16}, {}, None, "use sample_length >= 21"),
        ({}, {}, [[3] * 7] * 9, "nothing to calibrate on"),
        ({}, {}, [], "data is empty"),
        ({}, {}, ["text"], "there is no tokenizer"),
        ({"samples": 0}, {}, None, "samples"),
        ({"curve": [1.0]}, {}, None, "ratios above 1"),
    ],
    ids=str,
)
def test_what_cannot_be_calibrated_is_refused_before_anything_changes(
    config, facts, data, message, tmp_path
):
    model = converted(**facts)
    before = gate_state(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        dms.calibrate(
            model,
            {**CONFIG, **config},
            data=documents() if data is None else data,
            output_dir=tmp_path,
            progress=False,
        )
    assert_same(gate_state(model), before)
    assert not list(tmp_path.iterdir())


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="call apply_dms"):
        dms.calibrate(build("llama"), data=documents())
