# SPDX-License-Identifier: Apache-2.0
"""One model, every ratio: thresholds move along the measured curve, exactly back, and stay when it is saved."""

import pytest
import torch
from calibrations import IDS, assert_same, calibrated, documents, gate_state
from families import build, build_dms
from hypothesis import given
from hypothesis import strategies as st

import modelopt_dms as dms
from modelopt_dms.config.compression_ratio import physical_cr, rounded_down, rounded_up
from modelopt_dms.exporters.tuned import save_tuned
from modelopt_dms.gates.curve import CompressionError, Curve, CurvePoint
from modelopt_dms.gates.thresholds import (
    curve_of,
    expected_evicted_share,
    expected_ratios,
)


@pytest.fixture(scope="module")
def made():
    data = documents(80, shorter=False)
    config = {"samples": 48, "held_out": 32, "curve": [1.5, 2.0, 3.0, 4.0, 6.0]}
    return calibrated(config=config, data=data)


def curve(fractions):
    points = tuple(
        CurvePoint(-i, f, *[physical_cr(f, 100, 4)] * 3, i / 10)
        for i, f in enumerate(sorted(fractions))
    )
    return Curve(100, 4, 0, ((0.0,),), points)


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=6, unique=True).map(
        lambda x: [i / 1000 for i in x]
    ),
    st.floats(0, 1),
)
def test_the_curve_is_monotone_and_goes_through_its_points(fractions, part):
    found = curve(fractions)
    least, most = min(fractions), max(fractions)
    for point in found.points:
        assert found.at_fraction(point.evicted_fraction).kl == pytest.approx(point.kl, abs=1e-6)
    one = found.at_fraction(least + part * (most - least))
    two = found.at_fraction(most)
    assert one.shift >= two.shift - 1e-9 and one.kl <= two.kl + 1e-9


def test_the_curve_was_measured(made):
    model, result = made
    assert curve_of(model) == result.curve
    fractions = [x.evicted_fraction for x in result.curve.points]
    assert fractions[0] == 0.0 and result.curve.points[0].kl < 1e-6
    assert fractions == sorted(set(fractions))
    assert min(abs(x.shift) for x in result.curve.points) == 0.0
    assert result.curve.points[-1].compression_ratio == pytest.approx(6.0, rel=0.15)


@pytest.mark.parametrize("cr", [1.0, 1.7, 2.5, 3.0, 5.0])
def test_setting_a_ratio_gives_that_ratio(made, cr):
    model, _ = made
    point = dms.set_compression(model, cr)
    assert point.compression_ratio == cr
    ids = torch.tensor(documents(40, seed=9, shorter=False))
    model(ids, use_cache=True)
    assert dms.kv_stats(model).compression_ratio == pytest.approx(cr, rel=0.12)


def test_every_ratio_that_was_asked_for_is_on_the_curve():
    """Also the last one, whatever eviction in one layer does to the gates of the next."""
    model, result = calibrated(config={"curve": [2.0, 4.0, 6.5, 9.0]})
    for cr in (2.0, 3.0, 4.0, 6.5, 9.0):
        assert dms.set_compression(model, cr).compression_ratio == cr
    assert result.curve.points[-1].compression_ratio >= 9.0
    with pytest.raises(CompressionError, match="at most 9.14"):
        dms.set_compression(model, 9.2)


def test_the_range_that_other_texts_get_is_known(made):
    model, _ = made
    for cr in (2.0, 3.0, 5.0):
        dms.set_compression(model, cr)
        low, high = expected_ratios(model, 64)
        assert low < cr < high
        for row in torch.tensor(documents(12, seed=5, shorter=False)):
            model(row[None], use_cache=True)
            assert low <= dms.kv_stats(model).compression_ratio <= high
    longer = expected_ratios(model, 6400)
    assert longer[0] > low and longer[1] > high, "longer texts compress more"
    assert expected_ratios(build("llama"), 64) is None


def test_the_share_that_is_evicted_is_known(made):
    model, _ = made
    curve = curve_of(model)
    for cr in (1.7, 3.0, 5.0):
        dms.set_compression(model, cr)
        share = expected_evicted_share(model)
        assert physical_cr(share, curve.length, curve.window, curve.protect_first) == pytest.approx(
            cr, rel=1e-4
        )
    plain = build_dms("llama")
    assert expected_evicted_share(plain) == 1.0 - 1.0 / plain.config.dms_config["target_cr"]
    plain.config.dms_config = plain.config.dms_config | {"evict": False}
    assert expected_evicted_share(plain) == 0.0


def test_a_curve_of_another_version_is_one_error():
    model = build("llama")
    model.config.dms_curve = {"points": [{"shift": 0.0, "kl": 0.0}], "thresholds": [[0.0]]}
    with pytest.raises(CompressionError, match="damaged or of another version"):
        curve_of(model)


def test_there_and_back_is_exactly_where_it_was(made):
    model, _ = made
    dms.set_compression(model, 3.0)
    before = gate_state(model)
    for cr in (5.0, 1.3, 4.4, 3.0):
        dms.set_compression(model, cr)
    assert_same(gate_state(model), before)


def test_a_ratio_may_be_asked_for_at_another_length(made):
    model, result = made
    short, long = (dms.set_compression(model, 3.0, length=n) for n in (48, 4096))
    assert short.evicted_fraction > long.evicted_fraction
    assert physical_cr(long.evicted_fraction, 4096, 6) == pytest.approx(3.0)
    del result


@pytest.mark.parametrize(
    ("cr", "length", "message"),
    [
        (0.5, None, "must be at least 1"),
        (30.0, None, "at most 9.14"),
        (8.0, None, "out of what was measured"),
        (3.0, 10, "at most 1.42"),
    ],
)
def test_a_ratio_out_of_reach_is_refused_and_nothing_moves(made, cr, length, message):
    model, _ = made
    before = gate_state(model)
    with pytest.raises(CompressionError, match=message):
        dms.set_compression(model, cr, length=length)
    assert_same(gate_state(model), before)


def test_ends_of_a_range_are_printed_within_it():
    assert [rounded_down(x) for x in (8.5199, 8.52, 1.0, 1234.5)] == ["8.51", "8.52", "1", "1230"]
    assert [rounded_up(x) for x in (1.0001, 1.5, 12.31)] == ["1.01", "1.5", "12.4"]


def test_a_model_without_a_curve_says_so():
    from families import build

    model = dms.apply_dms(build("llama"), {"window": 4})
    with pytest.raises(CompressionError, match="carries no curve"):
        dms.set_compression(model, 2.0)


def test_curve_and_setting_are_saved_with_the_model(made, tmp_path):
    model, result = made
    dms.set_compression(model, 4.2)
    model.save_pretrained(tmp_path)
    loaded = dms.load(tmp_path)
    assert curve_of(loaded) == result.curve
    with torch.no_grad():
        assert torch.equal(loaded(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    for each in (model, loaded):
        dms.set_compression(each, 2.2)
    assert_same(gate_state(loaded), gate_state(model))


def test_a_tuned_copy_differs_in_thresholds_only(made, tmp_path):
    model, _ = made
    dms.set_compression(model, 3.0)
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "note.txt").write_text("kept")
    loaded = dms.load(tmp_path / "one")
    dms.set_compression(loaded, 2.0)
    save_tuned(loaded, tmp_path / "one", tmp_path / "two")
    again = dms.load(tmp_path / "two")
    assert_same(gate_state(again), gate_state(loaded))
    assert (tmp_path / "two" / "note.txt").read_text() == "kept"
    other = dms.load(tmp_path / "one").state_dict()
    changed = [k for k, x in again.state_dict().items() if not torch.equal(x, other[k])]
    assert changed and all(k.endswith("dms_gate.threshold") for k in changed)


def test_a_tuned_copy_of_something_else_is_refused(made, tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match="does not hold the thresholds"):
        save_tuned(made[0], tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "two").exists()
