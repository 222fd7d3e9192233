# SPDX-License-Identifier: Apache-2.0
"""A plan's bytes are those of real caches, its parameters those of real classes, its times a sum written out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import calibrated
from families import build, open_gates, tokens
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import modelopt_dms as dms
from modelopt_dms.config.recipe import load_recipe
from modelopt_dms.gates.thresholds import expected_evicted_share, expected_ratios
from modelopt_dms.kernels.layout import PageTables
from modelopt_dms.kernels.row_bytes import list_bytes
from modelopt_dms.serving.planner.capacity import plan
from modelopt_dms.serving.planner.hardware import gpu_of
from modelopt_dms.serving.planner.limit import cache_bytes, can_split, decode_step, weight_bytes
from modelopt_dms.serving.planner.model_shape import PlanError, shape_of, shipped_models
from modelopt_dms.serving.planner.plan_recipe import (
    Retention,
    Rows,
    kv_rows,
    planned_by_recipe,
)

WINDOW, LENGTH, BATCH = 32, 1536, 2
FORMATS = {
    "plain": None,
    "fp8": "general/ptq/fp8_default-kv_fp8",
    "fp8 a row": "kv_fp8_dynamic-dms_cr8",
    "int8": "kv_int8-dms_cr8",
    "nvfp4": "kv_nvfp4-dms_cr8",
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "one KV head, wide": ("qwen3", {"head_dim": 32, "num_key_value_heads": 1}),
}


def planned_bytes(model: PreTrainedModel, rows: tuple[Rows, Rows], cr: float, place: Path) -> Any:
    """Of one sequence of LENGTH tokens, from the model's saved config, a ratio and formats alone."""
    model.config.dtype = "float32"
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("dms_")}
    (place / "config.json").write_text(json.dumps(config))
    return cache_bytes(shape_of(str(place)), rows, Retention(cr, WINDOW), LENGTH)


def evicting(stats: dms.KVStats) -> float:
    """The ratio 1 / (1 - e) of gates that evicted the share e of what they could: all that a plan is told of a run."""
    return 1 / (1 - (LENGTH - stats.resident_tokens) / (LENGTH - WINDOW - 1))


def feed(model: PreTrainedModel, cache: Any, length: int) -> dms.KVStats:
    with torch.no_grad():
        ids = tokens(BATCH, length, seed=3)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return dms.kv_stats(model if cache is None else cache)


@pytest.mark.parametrize(
    ("shape", "format"),
    [
        *(("llama", x) for x in FORMATS),
        ("one KV head, wide", "plain"),
        ("one KV head, wide", "nvfp4"),
    ],
)
def test_planned_bytes_are_within_a_tenth_of_a_real_cache_in_pages(
    shape: str, format: str, tmp_path: Path
) -> None:
    family, base = SHAPES[shape]
    model = build(family, **base, max_position_embeddings=LENGTH)
    dms.apply_dms(model, {"window": WINDOW, "scale": 10.0})
    rows = (Rows(), Rows())
    if (recipe := FORMATS[format]) is not None:
        dms.quantize(model, load_recipe(recipe).quantize, [tokens(4, 64)])
        rows = kv_rows(planned_by_recipe(recipe))
    open_gates(model, fraction=0.5)
    pages = {"batch_size": BATCH, "max_length": LENGTH, "impl": "reference"}
    stats = feed(model, dms.DMSCache(model, **pages), LENGTH)
    assert stats.compression_ratio > 1.7
    cr = evicting(stats)
    found = planned_bytes(model, rows, cr, tmp_path)
    assert found.held * BATCH == pytest.approx(stats.kv_bytes, rel=0.1)
    assert found.resident * BATCH == pytest.approx(stats.resident_bytes, rel=0.01)
    cache = dms.DMSCache(model, **pages)
    cache.reserve(LENGTH, 1 - 1 / cr)
    feed(model, cache, 8)
    assert found.reserved * BATCH == sum(x.kv_bytes for x in cache.pools)


def test_planned_bytes_of_the_embedded_model_are_within_a_tenth_of_what_a_cpu_cache_holds(
    tmp_path: Path,
) -> None:
    """Its lists grow in pages of their own."""
    model, _ = dms.load_base("embedded")
    dms.apply_dms(model, {"window": WINDOW, "scale": 10.0})
    open_gates(model, fraction=0.75)
    stats = feed(model, None, LENGTH)
    found = planned_bytes(model, (Rows(), Rows()), evicting(stats), tmp_path)
    assert found.held * BATCH == pytest.approx(stats.kv_bytes, rel=0.1)
    assert found.resident * BATCH == pytest.approx(stats.resident_bytes, rel=0.01)


def test_a_dense_plan_is_what_a_dense_cache_holds(tmp_path: Path) -> None:
    model = build("qwen3", max_position_embeddings=LENGTH)
    model.config.dtype = "float32"
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    cache = model(tokens(1, 300), use_cache=True, logits_to_keep=1).past_key_values
    held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    found = cache_bytes(shape_of(str(tmp_path)), (Rows(), Rows()), None, 300)
    assert found.held == found.reserved == held


def test_rings_and_tables_are_counted_as_they_are_allocated() -> None:
    batch, heads, pages, window = 3, 2, 5, 7
    tables = PageTables.make(batch, heads, pages, window, 0, torch.ones(batch, dtype=torch.bool))
    names = ("table", "live", "seen", "ring_slot", "ring_evict")
    held = sum(getattr(tables, x).nbytes for x in names)
    assert held == batch * heads * list_bytes(window, pages)


@pytest.mark.parametrize("name", shipped_models())
def test_parameters_are_those_of_transformers_classes(name: str) -> None:
    fields = dict(shipped_models()[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(name).parameters == sum(x.numel() for x in model.parameters())


def test_parameters_are_the_published_ones() -> None:
    assert shape_of("Qwen3-8B").parameters == 8_190_735_360
    assert shape_of("meta-llama/Llama-3.1-8B").parameters == 8_030_261_248


def test_quantized_weights_take_their_bits_and_scales() -> None:
    shape = shape_of("Qwen3-8B")
    linear = sum(shape.linears.values())
    tables = 2 * (shape.parameters - linear)
    fp8 = planned_by_recipe("fp8_default-kv_fp8-dms_cr8")
    nvfp4 = planned_by_recipe("nvfp4_default-kv_nvfp4-dms_cr8")
    assert weight_bytes(shape, None) == 2 * shape.parameters
    assert weight_bytes(shape, fp8) == tables + linear
    assert weight_bytes(shape, nvfp4) == tables + linear * (4 + 8 / 16) / 8


def test_a_step_is_the_sum_of_what_it_reads() -> None:
    """Qwen3-8B on an H200, dense and at exactly CR 8, by a sum written out here."""
    shape, gpu = shape_of("Qwen3-8B"), gpu_of("h200")
    plain = (Rows(), Rows())
    read = 2 * (shape.parameters - shape.embedding)
    token = 36 * 8 * 2 * 128 * 2
    assert token == 147_456
    for cr, retention in ((1, None), (8, Retention(8.0, 256, 0, 32768))):
        cache = cache_bytes(shape, plain, retention, 32768)
        step = decode_step(shape, None, plain, cache, 16, gpu)
        expected = (read + 16 * token * 32768 / cr) / (4.8e12 * 0.9)
        assert step.seconds == pytest.approx(expected, rel=1e-6)


def test_gpus_share_heads_and_weights_until_there_are_no_more_heads() -> None:
    rows = {(x.variant, x.tp): x for x in plan("Qwen3-30B-A3B", tp=(1, 4, 8)).rows}
    one, four, eight = (rows["DMS 8x *", x] for x in (1, 4, 8))
    assert four.kv_bytes == pytest.approx(one.kv_bytes / 4, rel=1e-6)
    assert eight.kv_bytes == four.kv_bytes  # 4 KV heads
    assert eight.weight_bytes == pytest.approx(one.weight_bytes / 8, rel=1e-6)


def test_numbers_of_gpus_are_those_that_share_the_heads_evenly() -> None:
    shape = shape_of("Qwen2.5-7B")  # 28 query heads, 4 KV heads
    # vLLM: query heads are divided; KV heads are divided, or each is held by as many GPUs.
    fits = [x for x in range(1, 29) if 28 % x == 0 and (4 % x == 0 or x % 4 == 0)]
    assert [x for x in range(1, 29) if can_split(shape, x)] == fits == [1, 2, 4, 28]
    assert {x.tp for x in plan("Qwen2.5-7B").rows} == {1, 2, 4}
    with pytest.raises(PlanError, match="--tp 8: Qwen2.5-7B has 28 query heads and 4 KV heads"):
        plan("Qwen2.5-7B", tp=(1, 8))


def test_a_ratio_at_another_length_is_explained_by_the_share_that_the_recipe_evicts() -> None:
    found = plan("Qwen3-8B", context=32768, recipe="calibrated_cr8", tp=(1,))
    share = (1 - 1 / 8) * 8192 / (8192 - 517)
    here = 32768 / (32768 - share * (32768 - 517))
    assert found.rows[1].compression_ratio == pytest.approx(here, rel=1e-3)
    assert (
        f"asks for 8 at 8,192 tokens, which evicts {share:.1%} of all but the 517" in found.ratios
    )
    assert f"the same share of 32,768 tokens gives {here:.1f}" in found.ratios


def test_a_compressed_directory_is_planned_at_the_ratio_that_it_is_set_to(tmp_path: Path) -> None:
    """Not at its recipe's: thresholds move with set_compression, and tune."""
    model, _ = calibrated(config={"curve": [2.0, 3.0, 4.0]})
    for cr in (2.5, 4.0):
        dms.set_compression(model, cr)
        model.save_pretrained(tmp_path / str(cr))
        found = plan(str(tmp_path / str(cr)), context=64, tp=(1,))
        assert found.rows[1].variant == f"DMS {cr:g}x *"
        assert found.rows[1].compression_ratio == pytest.approx(cr, rel=0.01)
        assert found.evicted_share == pytest.approx(expected_evicted_share(model), abs=1e-6)
        low, high = expected_ratios(model, 64) or (0.0, 0.0)
        assert f"Expect {low:.1f} to {high:.1f} of other texts" in found.ratios


def test_what_does_not_fit_has_no_speed() -> None:
    row = plan("Llama-3.1-70B", "h100", 1024, tp=(1,)).rows[0]
    assert (row.sequences, row.step_ms, row.tokens_per_second) == (0, None, 0.0)
    asked = plan("Qwen3-8B", "h200", tp=(1,), batch=64).rows
    assert asked[0].step_ms is None and asked[1].step_ms is not None


def test_a_compressed_directory_is_planned_as_it_is(tmp_path: Path) -> None:
    model = build("llama")
    dms.apply_dms(model, {"window": 16, "target_cr": 2.0})
    dms.quantize(model, load_recipe("kv_fp8_dynamic-dms_cr8").quantize, [tokens(1, 8)])
    model.save_pretrained(tmp_path)
    rows = plan(str(tmp_path), context=4096, tp=(1,)).rows
    assert [x.variant for x in rows if x.variant.endswith("*")] == ["DMS 2x, FP8 a row *"]
    with pytest.raises(PlanError, match="compressed already"):
        plan(str(tmp_path), recipe="dms_cr8")
