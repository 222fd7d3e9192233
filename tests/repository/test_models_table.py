# SPDX-License-Identifier: Apache-2.0
"""The table of models: some architectures at every run, all of them in a slow one."""

import json
import sys
from pathlib import Path

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import model_checks  # noqa: E402
import model_table  # noqa: E402
from tiny_configs import architectures, tiny_model  # noqa: E402

# One of each kind: plain, with a window, latent, experts, recurrent layers, learned positions, renamed weights,
# a window that holds everything, and layers that are refused.
SOME = {
    "smollm3": "exact",
    "exaone4": "exact",
    "minicpm3": "exact",
    "qwen3_next": "exact",
    "opt": "exact",
    "phi3": "exact",
    "falcon_h1": "refused",
    "rwkv": "refused",
}


def test_some_architectures_are_what_the_table_says() -> None:
    rows = model_table.run(list(SOME))
    assert {row.name: row.result for row in rows} == SOME, [row.why for row in rows]
    for row in rows:
        if row.result == "exact":
            assert (
                row.converted and {"off", "cached", "padded", "reloaded"} <= row.differences.keys()
            )
            assert row.differences["off"] < 1e-5 and row.differences["cached"] < 1e-4
        else:
            assert row.why and not row.differences


@pytest.mark.slow
def test_a_check_fails_when_a_path_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The table would show it: a cache that forgets a decision, and a directory that is not what was saved."""
    from modelopt_dms.kvcache.head_caches import HeadCaches

    append = HeadCaches.append

    def forgets(self, k, v, evict, valid):
        return append(self, k, v, evict & (self.seen % 2 == 0), valid)

    monkeypatch.setattr(HeadCaches, "append", forgets)
    row = model_checks.check("smollm3", tmp_path)
    assert row.differences["cached"] > row.limit("cached")
    saved = next(tmp_path.glob("smollm3/config.json"))
    saved.write_text(saved.read_text().replace('"window": 5', '"window": 50'))
    model_checks.reload([row], tmp_path)
    assert row.result == "deviates" and "cached" in row.why and "reloaded" in row.why


@pytest.mark.skipif(not model_table.DATA.is_file(), reason="`make models` has not been run")
def test_the_table_in_the_docs_is_what_was_measured() -> None:
    data = json.loads((ROOT / "benchmarks" / "results" / "models.json").read_text())
    rows = [model_checks.Row(**x) for x in data["rows"]]
    if data["transformers"] == model_table.transformers.__version__:
        assert (ROOT / "docs" / "models.md").read_text() == model_table.table(rows)
        assert {row.name for row in rows} == set(architectures())
    results = [row.result for row in rows]
    assert results.count("exact") + results.count("refused") >= 110
    assert "deviates" not in results


def test_every_tiny_model_is_tiny() -> None:
    for name in SOME:
        assert sum(x.numel() for x in tiny_model(name).parameters()) < 300_000


@pytest.mark.slow
def test_no_architecture_deviates() -> None:
    rows = model_table.run(list(architectures()))
    assert not [(row.name, row.why) for row in rows if row.result == "deviates"]
    assert sum(row.result == "exact" for row in rows) >= 110
