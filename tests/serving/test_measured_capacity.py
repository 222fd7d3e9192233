# SPDX-License-Identifier: Apache-2.0
"""Sequences that fit a GPU at a ratio that was measured are a sum written out here."""

import json
from pathlib import Path

import pytest

from modelopt_dms.serving.planner.capacity import plan
from modelopt_dms.serving.planner.measured import capacity
from modelopt_dms.serving.planner.model_shape import PlanError, shipped_models

WINDOW, FIRST, LENGTH, RATIO = 64, 4, 1024, 3.85
LAYERS, HEADS, DIM = 28, 8, 128


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = shipped_models()["Qwen3-0.6B"] | {"max_position_embeddings": 8192, "dtype": "bfloat16"}
    own = {"window": WINDOW, "protect_first": FIRST, "target_cr": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(config | {"dms_config": own}))
    return tmp_path


def test_rows_follow_from_the_measured_ratio_and_not_from_the_recipes(directory: Path) -> None:
    found = capacity(directory, "h200", RATIO + 0.004, LENGTH)
    assert found["contexts"] == [1024, 4096, 8192] and found["ratio"] == RATIO
    weights = plan(str(directory), "h200", LENGTH, tp=[1]).rows[0].weight_bytes
    room = 141e9 * 0.9 - weights
    share = (1 - 1 / RATIO) * LENGTH / (LENGTH - WINDOW - 1 - FIRST)
    dense, dms, fp8 = found["rows"]
    assert (dense["variant"], dms["variant"], fp8["variant"]) == (
        "full cache",
        "DMS",
        "DMS, FP8 rows",
    )
    for i, context in enumerate(found["contexts"]):
        whole = LAYERS * HEADS * context * 4 * DIM
        assert dense["sequences"][i] == int(room / whole)
        live = context - share * (context - WINDOW - 1 - FIRST)
        tables = 5 * (WINDOW + 1) + 4 * context // 64 + 8
        for row, bytes_of_row in ((dms, 4 * DIM), (fp8, 2 * DIM)):
            one = LAYERS * HEADS * ((live / 64 + 0.5) * 64 * bytes_of_row + tables)
            assert row["kv_bytes"][i] == pytest.approx(one, rel=1e-6)
            assert row["sequences"][i] == int(room / one)
        assert dms["compression_ratio"][i] == pytest.approx(context / live, abs=1e-3)
    assert dms["compression_ratio"][0] == pytest.approx(RATIO, abs=1e-3)


def test_what_cannot_be_planned_is_said(directory: Path) -> None:
    with pytest.raises(PlanError, match="--gpu 'h2000' is not known"):
        capacity(directory, "h2000", RATIO, LENGTH)
    (directory / "config.json").write_text('{"model_type": "mamba", "dms_config": {}}')
    with pytest.raises(PlanError, match="model_type='mamba' is not planned for"):
        capacity(directory, "h200", RATIO, LENGTH)
