# SPDX-License-Identifier: Apache-2.0
"""The report: what it shows is what the cache holds, and the page needs nothing but itself."""

import copy
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import EMBEDDED, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from modelopt_dms.calibration.run import calibrate
from modelopt_dms.config.output_dir import OutputError
from modelopt_dms.evaluation.footprint import footprint
from modelopt_dms.evaluation.memories import knows_records, read, records
from modelopt_dms.evaluation.plain_twin import NoTwinError, plain_twin
from modelopt_dms.evaluation.report_page import render
from modelopt_dms.evaluation.report_page.build import Origin, ReportPlan, build, cost
from modelopt_dms.evaluation.report_page.growth import grow
from modelopt_dms.evaluation.report_page.retention import retention
from modelopt_dms.evaluation.report_page.tradeoff import (
    TAIL,
    measure_answers,
    measure_kl,
    reachable,
)
from modelopt_dms.evaluation.score import score_task
from modelopt_dms.evaluation.tasks import held_out_text, make_episodes
from modelopt_dms.gates.gate import eviction_off, gates
from modelopt_dms.gates.thresholds import set_compression, thresholds_of
from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.modeling.mode import apply_dms

LENGTH = 320


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """The embedded model, calibrated on little: it evicts, and carries a curve."""
    plain = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    made = apply_dms(plain, {"window": 16, "target_cr": 3.0})
    how = {"samples": 4, "sample_length": LENGTH, "batch_size": 2, "held_out": 2, "curve": [2, 4]}
    calibrate(made, how, data=held_out_text(tokenizer, LENGTH, 6, 0), progress=False)
    return made


@pytest.fixture(scope="module")
def figures(model: Any, tokenizer: Any) -> dict[str, Any]:
    plan = ReportPlan(length=LENGTH, questions=2, prompts=1, ratios=(2.0, 3.0, 99.0), new_tokens=4)
    spent: list[float] = []
    before = thresholds_of(model)
    found = build(model, tokenizer, plan, Origin("toy", "a command"), spent.append)
    found["capacity"] = {
        "gpu": "a GPU", "source": "a sheet", "memory_utilization": 0.9, "ratio": 2.5, "length": LENGTH,
        "note": "a model", "contexts": [LENGTH, 4096],
        "rows": [
            {"variant": x, "sequences": [40, 3], "kv_bytes": [10**6, 10**7], "compression_ratio": [1.0, 1.0]}
            for x in ("full cache", "DMS", "DMS, FP8 rows")
        ],
    }  # fmt: skip
    assert thresholds_of(model) == before
    assert sum(spent) == pytest.approx(cost(plan, 2), rel=0.35)
    return found


def test_a_plain_twin_is_the_model_with_eviction_off_and_shares_its_weights(model: Any) -> None:
    twin = plain_twin(model)
    ids = torch.randint(5, 500, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), eviction_off(model):
        expected = model(input_ids=ids).logits
    with torch.no_grad():
        found = twin(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    shared = {x.data_ptr() for x in model.parameters()}
    assert {x.data_ptr() for x in twin.parameters()} <= shared
    assert not gates(twin) and not hasattr(twin.config, "dms_config")
    with pytest.raises(NoTwinError, match="has no gates"):
        plain_twin(twin)


def test_a_model_whose_gates_borrow_a_dimension_has_no_twin() -> None:
    plain = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    with pytest.raises(NoTwinError, match="neuron"):
        plain_twin(apply_dms(plain, {"window": 16, "gate": "neuron"}))


def test_what_the_page_shows_of_every_head_is_what_the_physical_cache_holds(
    model: Any, tokenizer: Any
) -> None:
    ids = held_out_text(tokenizer, LENGTH, 1, 5)[0]
    kept = retention(model, tokenizer, ids)
    live = [n for x in kv_stats(model).layers for n in x.resident[0].tolist()]
    shown = kept.figures()
    assert shown["resident"] == live and min(live) < LENGTH // 2
    bits = torch.tensor(
        [[int(x) for x in f"{int(code, 16):0{len(live)}b}"] for code in kept.figures()["held"]]  # type: ignore[attr-defined]
    )
    assert bits.sum(0).tolist() == live
    assert bits.sum(1).tolist() == kept.heads_holding()
    assert bits[-17:].all() and "".join(kept.tokens) == tokenizer.decode(ids)


def test_the_toys_text_holds_the_facts_that_are_asked_about(tokenizer: Any) -> None:
    assert knows_records(tokenizer)
    told = records(tokenizer, LENGTH, 0, 3)
    assert len(told.ids) == LENGTH and len(told.asks) == len(told.spans) == 3
    for span, ask in zip(told.spans, told.asks, strict=True):
        fact = tokenizer.decode(told.ids[span.start : span.stop]).split()
        assert fact == ["keep", ask.question.split()[-1], ask.right]


def test_accuracy_is_that_of_score_task_and_peers_hold_what_dms_held(
    model: Any, tokenizer: Any
) -> None:
    prompts = {"recall": make_episodes("recall", tokenizer, LENGTH, 3, 0, 4)}
    twin = plain_twin(model)
    points = measure_answers(model, twin, prompts, [2.0, 3.0], LENGTH, lambda: True)
    found = {(x.method, x.asked): x for x in points}
    assert found["full", None].right == round(12 * score_task(twin, prompts["recall"]).value)
    for ratio in (2.0, 3.0):
        peer = copy.deepcopy(model)
        set_compression(peer, ratio, length=LENGTH)
        expected = score_task(peer, prompts["recall"])
        point = found["dms", ratio]
        assert (point.right, point.count) == (round(12 * expected.value), 12)
        assert point.ratio == pytest.approx(expected.context.compression_ratio)
        for name in ("keydiff", "streaming"):
            assert found[name, ratio].ratio == pytest.approx(point.ratio, rel=0.02)
    out_of_time = measure_answers(model, twin, prompts, [2.0], LENGTH, lambda: False)
    assert {x.count for x in out_of_time} == {4}  # the prompt that had begun


@torch.no_grad()
def test_kl_of_a_peer_is_that_of_a_mask_over_what_it_evicted(model: Any, tokenizer: Any) -> None:
    ids = held_out_text(tokenizer, LENGTH, 1, 2)[0]
    twin = plain_twin(model)
    points = {x.method: x for x in measure_kl(model, twin, {"code": ids}, [3.0], lambda: True)}
    start = LENGTH - TAIL
    kept = round(start / points["streaming"].ratio)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[:, 4 : start - kept + 4] = 0
    full, cut = (
        twin(
            input_ids=torch.tensor([ids[start:]]),
            past_key_values=read(twin, ids[:start]),
            attention_mask=seen,
            position_ids=torch.arange(start, LENGTH)[None],
        )
        .logits[0]
        .double()
        .log_softmax(-1)
        for seen in (torch.ones_like(mask), mask)
    )
    expected = (full.exp() * (full - cut)).sum(-1).mean().item()
    assert points["streaming"].kl == pytest.approx(expected, rel=1e-3)
    assert points["dms"].kl is not None and points["dms"].kl > 1e-3


def test_ratios_beyond_the_curve_are_left_out_and_named(
    model: Any, figures: dict[str, Any]
) -> None:
    found, lines = reachable(model, (2.0, 3.0, 99.0), LENGTH)
    assert found == [2.0, 3.0] and len(lines) == 1
    assert lines[0].startswith("Ratio 99 is not shown: cr=99 must be at least 1 and, as")
    assert lines[0] in figures["notes"] and lines[0] in render.page(figures)
    curve = model.config.dms_curve
    del model.config.dms_curve
    try:
        assert reachable(model, (2.0,), LENGTH)[0] == [None]
        assert (
            "Ratios 2 are not shown: the model carries no curve"
            in reachable(model, (2.0,), LENGTH)[1][0]
        )
    finally:
        model.config.dms_curve = curve


def test_growth_ends_at_what_the_cache_holds_of_the_same_tokens(model: Any, tokenizer: Any) -> None:
    ids = held_out_text(tokenizer, 200, 1, 3)[0]
    full, written = grow(plain_twin(model), ids, 5, None, lambda: None)
    assert full.seen[-1] == full.resident[-1] == 205
    dms, same = grow(model, ids, 5, written, lambda: None)
    assert same == written and dms.seen == full.seen
    held = footprint(read(model, [*ids, *written]))
    assert dms.resident[-1] == pytest.approx(held.resident_tokens)
    assert dms.milliseconds[:5] == [None] * 5 and all(x is not None for x in dms.milliseconds[-5:])


def test_the_page_has_all_parts_and_asks_for_no_other_file(figures: dict[str, Any]) -> None:
    json.dumps(figures, allow_nan=False)
    assert {x["method"] for x in figures["accuracy"]} == {"full", "dms", "keydiff", "streaming"}
    text = render.page(figures)
    assert len(text.encode()) < 5_000_000
    plain = re.sub(r'<script type="application/octet-stream".*?</script>', "", text, flags=re.S)
    assert not re.search(r'(src|href)="(?!#)', plain) and "http" not in plain.split('"data"')[0]
    for part in ("text", "heads", "answers", "tradeoff", "growth", "capacity", "made"):
        assert f'<section id="{part}">' in text
    assert text.count('data-n="') == LENGTH


def test_nothing_that_a_text_or_a_model_says_becomes_markup(figures: dict[str, Any]) -> None:
    bad = "</script><script>alert(1)</script><b>&\u2028"
    wrong = copy.deepcopy(figures)
    wrong["name"] = wrong["retention"]["tokens"][3] = bad
    wrong["answers"]["rows"][0]["answers"]["dms"] = bad
    text = render.page(wrong)
    assert "alert(1)</script>" not in text and "<b>" not in text and text.count("<script") == 3
    data = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data) == json.loads(json.dumps(wrong))


def test_shades_have_a_class_of_their_own_for_tokens_that_no_head_holds() -> None:
    assert [render.shade(x, 20) for x in (0, 1, 2, 5, 10, 15, 20)] == [0, 1, 2, 3, 4, 5, 5]


def test_a_page_replaces_only_a_page(figures: dict[str, Any], tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    render.write_page(place, figures)
    render.write_page(place, figures)
    other = tmp_path / "notes.html"
    other.write_text("<p>mine")
    with pytest.raises(OutputError, match="is no report of ours"):
        render.write_page(other, figures)
    assert other.read_text() == "<p>mine"


def test_without_plotly_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "find_spec", lambda name: None)
    with pytest.raises(render.ReportError, match=r"pip install 'plotly>=6'"):
        render.check_drawable()


BROWSER = os.environ.get("MODELOPT_DMS_BROWSER_PYTHON") or (
    sys.executable if find_spec("playwright") else None
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs playwright and Chromium: make test-browser")
def test_a_browser_draws_every_plot_at_both_widths_and_schemes(
    figures: dict[str, Any], tmp_path: Path
) -> None:
    assert BROWSER is not None
    place = tmp_path / "page.html"
    render.write_page(place, figures)
    command = [BROWSER, str(ROOT / "tests/helpers/browser.py"), str(place)]
    seen = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {(x["width"], x["scheme"]) for x in seen} == {
        (width, scheme) for width in (1280, 390) for scheme in ("light", "dark")
    }
    for x in seen:
        assert x["messages"] == [] and x["requests"] == []
        assert x["scroll_width"] <= x["width"]
        assert len(x["plots"]) == 10 and all(count > 0 for count in x["plots"].values())
        assert f"held by {figures['retention']['counts'][40]} of 8 heads" in x["hovered"]
        assert x["held_cells"] == figures["retention"]["counts"][40]
        assert "tokens" in x["heat_map_hover"]
        assert x["counted"] == str(figures["retention"]["counts"][40])
    assert len({x["ground"] for x in seen}) == 2
