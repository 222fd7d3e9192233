# SPDX-License-Identifier: Apache-2.0
"""compress: nothing happens before everything is checked, and nothing is ever half-written."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor

import modelopt_dms as dms
from modelopt_dms import pipeline
from modelopt_dms.config import output_dir
from modelopt_dms.config.bundled import list_recipes
from modelopt_dms.config.recipe import Recipe
from modelopt_dms.exporters import RECIPE_FILE
from modelopt_dms.gates.thresholds import curve_of
from modelopt_dms.modeling.convert import is_converted
from modelopt_dms.quantization.apply import is_quantized

RECIPE = Recipe(
    dms={"target_cr": 2.0, "window": 4, "scale": 10.0},
    retrofit={
        "steps": 4,
        "sequence_length": 32,
        "batch_size": 2,
        "save_steps": 2,
        "learning_rate": 0.05,
    },
)
DOCUMENTS = [list(range(i % 40, i % 40 + 32)) for i in range(24)]
IDS = torch.arange(48)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def test_compress_saves_a_model_that_loads_as_the_same(tmp_path: Path) -> None:
    model = dms.compress(
        build("llama"), RECIPE, data=DOCUMENTS, output_dir=tmp_path / "out", progress=False
    )
    out = tmp_path / "out"
    assert torch.equal(logits(dms.load(out)), logits(model))
    assert dms.load_recipe(out / RECIPE_FILE) == RECIPE
    measured = json.loads((out / pipeline.SUMMARY_FILE).read_text())["retrofit"]
    row = f"| retrofit | 32 | 2 | {measured['compression_ratio']:.2f} | {measured['kl']:.4f} |"
    assert row in (out / "README.md").read_text()


def test_a_finished_directory_holds_nothing_that_only_a_resume_needs(tmp_path: Path) -> None:
    recipe = Recipe(
        **RECIPE.model_dump(exclude={"calibrate", "quantize", "export"}),
        calibrate={"samples": 2, "sample_length": 32, "held_out": 2},
    )
    dms.compress(
        build("llama"), recipe, data=DOCUMENTS, output_dir=tmp_path / "out", progress=False
    )
    found = {str(x.relative_to(tmp_path / "out")) for x in (tmp_path / "out").rglob("*")}
    assert found == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("dms_recipe.yaml", "dms_summary.json"),
        *("retrofit", "retrofit/train_log.jsonl"),
    }


def test_without_an_output_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dms.compress(build("llama"), RECIPE, data=DOCUMENTS, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_a_retrofit_makes_gates_that_evict_nothing() -> None:
    model = build("llama")
    before = logits(model)
    compressed = dms.compress(model, Recipe(dms={"window": 4}))
    torch.testing.assert_close(logits(compressed), before, atol=1e-6, rtol=0)


def test_a_run_that_dies_while_saving_is_finished_by_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dms.compress(
        build("llama"), RECIPE, data=DOCUMENTS, output_dir=tmp_path / "a", progress=False
    )
    replace = os.replace

    def dies_at_the_weights(source: Any, target: Any) -> None:
        if str(target).endswith("out/model.safetensors"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(output_dir.os, "replace", dies_at_the_weights)
    with pytest.raises(KeyboardInterrupt):
        dms.compress(
            build("llama"), RECIPE, data=DOCUMENTS, output_dir=tmp_path / "out", progress=False
        )
    monkeypatch.undo()
    assert not (tmp_path / "out" / "config.json").exists()
    dms.compress(
        build("llama"), RECIPE, data=DOCUMENTS, output_dir=tmp_path / "out", progress=False
    )
    assert torch.equal(logits(dms.load(tmp_path / "out")), logits(whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": []}, "data is empty"),
        ({"data": None}, "data is missing"),
        ({"data": ["text"]}, "there is no tokenizer"),
        ({"data": [[10**6]]}, "embedding has"),
        ({"data": [[1, 2, 3]]}, "too short"),
        ({"overrides": {"dms.layers": ["nothing*"]}}, "not matched by dms.layers"),
        ({"overrides": {"dms.window": 31}}, "cannot be reached"),
        ({"overrides": {"dms.gate": "neuron"}}, "no parameters of its own"),
    ],
)
def test_a_mistake_is_found_before_the_model_or_the_disk_is_touched(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = build("llama")
    arguments = {"data": DOCUMENTS, "output_dir": tmp_path / "out", "progress": False} | changes
    with pytest.raises(ValueError, match=message):
        dms.compress(model, RECIPE, **arguments)
    assert not is_converted(model) and not (tmp_path / "out").exists()


def test_checkpoints_of_another_run_are_refused_before_the_model_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    arguments: dict[str, Any] = {
        "data": DOCUMENTS,
        "output_dir": tmp_path / "out",
        "progress": False,
    }
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "save", dies)
        dms.compress(build("llama"), RECIPE, **arguments)
    model = build("llama")
    with pytest.raises(ValueError, match=r"retrofit.tau \(there 0.1, now 0.2\)"):
        dms.compress(model, RECIPE, overrides={"retrofit.tau": 0.2}, **arguments)
    assert not is_converted(model)


def test_output_directories_that_would_lose_something_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.json").touch()
    for name, message in (
        ("file", "is a file"),
        ("foreign", "thesis.tex"),
        ("done", "already holds"),
    ):
        with pytest.raises(output_dir.OutputError, match=message):
            output_dir.check_output(tmp_path / name)
    assert output_dir.check_output(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"


def test_a_read_only_output_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The owner of this process may be root, to whom nothing is read-only.
    monkeypatch.setattr(output_dir.os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(output_dir.OutputError, match="read-only"):
        output_dir.check_output(tmp_path / "new")


TINY = {
    "dms.protect_first": 0,
    "dms.window": 4,
    "dms.scale": 10.0,
    "retrofit.steps": 2,
    "retrofit.sequence_length": 48,
    "retrofit.batch_size": 2,
    "retrofit.gradient_accumulation_steps": 1,
    "retrofit.warmup_steps": 0,
    "retrofit.sharding": "none",
}
# A ratio of 16 needs longer samples.
CALIBRATED = {"calibrate.samples": 4, "calibrate.sample_length": 96, "calibrate.held_out": 4}
SCALED = {"quantize.samples": 4, "quantize.sample_length": 32, "quantize.batch_size": 2}


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_runs_scaled_to_a_tiny_model(name: str, tmp_path: Path) -> None:
    wanted = dms.load_recipe(name)
    changes = {
        key: value
        for key, value in (TINY | SCALED | CALIBRATED | {"retrofit.sequence_length": 96}).items()
        if getattr(wanted, key.split(".")[0]) is not None
    }
    base = {"head_dim": 16, "hidden_size": 32}
    model = dms.compress(
        build("llama", **base),
        name,
        data=[[*range(60), *range(36)]] * 8,
        overrides=changes,
        output_dir=tmp_path / "out",
        progress=False,
    )
    loaded = dms.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert curve_of(loaded) == curve_of(model)
    stored = dms.load_recipe(tmp_path / "out" / RECIPE_FILE)
    assert stored == dms.load_recipe(name, changes)
    assert is_quantized(model) == (wanted.quantize is not None)
    exported = tmp_path / "out" / pipeline.EXPORT_DIR
    assert exported.exists() == (wanted.export is not None)
    if wanted.export is not None:
        loaded = dms.load(exported)
        assert torch.equal(logits(loaded), logits(model))
        assert curve_of(loaded) == curve_of(model)
        assert dms.load_recipe(exported / RECIPE_FILE) == stored


QUANTIZED = dms.load_recipe("fp8_default-kv_fp8-dms_cr8", TINY | SCALED | {"dms.target_cr": 2.0})


@pytest.mark.parametrize("order", ["before_retrofit", "after_retrofit"])
def test_gates_learn_under_fake_quantization_when_the_recipe_says_so(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = pipeline.retrofit

    def spy(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(is_quantized(model))
        return original(model, *args, **kwargs)

    monkeypatch.setattr(pipeline, "retrofit", spy)
    recipe = dms.load_recipe(QUANTIZED, {"quantize.order": order, "retrofit.steps": 6})
    model = dms.compress(
        build("llama"), recipe, data=DOCUMENTS, output_dir=tmp_path / "out", progress=False
    )
    assert seen == [order == "before_retrofit"]
    assert torch.equal(logits(dms.load(tmp_path / "out")), logits(model))


def test_a_quantization_aware_run_that_dies_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"quantize.order": "before_retrofit", "retrofit.steps": 6, "retrofit.save_steps": 2}
    recipe = dms.load_recipe(QUANTIZED, changes)
    options = {"data": DOCUMENTS, "progress": False}
    whole = dms.compress(build("llama"), recipe, output_dir=tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "export", lambda *args, **kwargs: _interrupt())
        dms.compress(build("llama"), recipe, output_dir=tmp_path / "cut", **options)
    shutil.copytree(
        tmp_path / "cut" / pipeline.RETROFIT_DIR, tmp_path / "other" / pipeline.RETROFIT_DIR
    )
    again = dms.compress(build("llama"), recipe, output_dir=tmp_path / "cut", **options)
    assert torch.equal(logits(again), logits(whole))
    other = dms.load_recipe(recipe, {"quantize.order": "after_retrofit"})
    with pytest.raises(ValueError, match="quantize"):
        dms.compress(build("llama"), other, output_dir=tmp_path / "other", **options)


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_recipe_of_modelopt_quantizes_a_model_with_or_without_gates(tmp_path: Path) -> None:
    recipe = dms.load_recipe("general/ptq/fp8_default-kv_fp8", SCALED)
    plain = dms.compress(build("llama"), recipe, data=DOCUMENTS)
    assert is_quantized(plain) and not is_converted(plain)
    dms.compress(build("llama"), RECIPE, data=DOCUMENTS, output_dir=tmp_path / "a", progress=False)
    both = dms.compress(
        dms.load(tmp_path / "a"), recipe, data=DOCUMENTS, output_dir=tmp_path / "b", progress=False
    )
    assert is_quantized(both) and is_converted(both)
    assert torch.equal(logits(dms.load(tmp_path / "b")), logits(both))


def test_what_a_quantization_lacks_is_said_before_anything_is_done(tmp_path: Path) -> None:
    model = build("llama")
    before = logits(model)
    recipe = dms.load_recipe("general/ptq/fp8_default-kv_fp8")
    with pytest.raises(ValueError, match="data is missing"):
        dms.compress(model, recipe)
    with pytest.raises(ValueError, match="needs an output_dir"):
        dms.compress(model, QUANTIZED, data=DOCUMENTS)
    bad = {"quant_cfg": [{"quantizer_name": "*k_bmm_quantizer", "cfg": {"num_bits": 4}}]}
    with pytest.raises(ValueError, match="num_bits 4"):
        dms.compress(model, Recipe(quantize=bad), data=DOCUMENTS, output_dir=tmp_path / "out")
    assert not is_quantized(model) and not (tmp_path / "out").exists()
    assert torch.equal(logits(model), before)


def test_a_recipe_that_calibrates_nothing_needs_no_data() -> None:
    quantized = dms.compress(build("llama"), "general/ptq/mxfp4_mlp_weight_only")
    assert is_quantized(quantized)


def test_a_model_that_cannot_be_exported_is_saved_all_the_same(tmp_path: Path) -> None:
    recipe = dms.load_recipe(QUANTIZED, {"retrofit.steps": 2, "export.format": "tensorrt"})
    arguments = {"data": DOCUMENTS, "output_dir": tmp_path / "out", "progress": False}
    with pytest.raises(ValueError, match="float16 or bfloat16.*saved in"):
        dms.compress(build("llama"), recipe, **arguments)
    assert is_quantized(dms.load(tmp_path / "out"))
    assert not (tmp_path / "out" / pipeline.EXPORT_DIR).exists()
