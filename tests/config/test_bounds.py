# SPDX-License-Identifier: Apache-2.0
"""Nothing absurd is accepted: numbers, recipes, configs, curves, gates, weights; what was asked is compared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import calibrated, documents
from families import build, build_dms
from safetensors.torch import load_file, save_file

from modelopt_dms.checkpoints.base import load_base
from modelopt_dms.checkpoints.load import load
from modelopt_dms.config.bundled import RecipeError
from modelopt_dms.config.calibrate import CalibrateConfig
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.recipe import load_recipe
from modelopt_dms.config.recipe_file import check_recipe
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.gates.thresholds import missed_ratio, ratio_warning
from modelopt_dms.modeling.convert import is_converted
from modelopt_dms.modeling.finite import WeightError, check_weights
from modelopt_dms.modeling.mode import CheckpointError, apply_dms

NUMBERS = [
    (f"{section}.{name}", kind)
    for section, schema in (
        ("dms", DMSConfig),
        ("calibrate", CalibrateConfig),
        ("retrofit", RetrofitConfig),
    )
    for name, field in schema.model_fields.items()
    if (kind := field.annotation) in (int, float)
]


@pytest.mark.parametrize(("field", "kind"), NUMBERS)
def test_no_number_of_a_recipe_is_infinite_or_absurd(field: str, kind: type) -> None:
    for value in (".nan", ".inf", "-.inf", "1.0e+18", "1" + 30 * "0"):
        with pytest.raises(RecipeError) as error:
            load_recipe("calibrated_cr4", ["retrofit.steps=9", f"{field}={value}"])
        assert field in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["calibrate.curve", "retrofit.cr_range"])
def test_no_number_in_a_list_is_infinite(field: str) -> None:
    for value in ("[2, .inf]", "[2, .nan]", "[2, 1e18]"):
        with pytest.raises(RecipeError, match=field):
            load_recipe("calibrated_cr4", ["retrofit.steps=9", f"{field}={value}"])


@pytest.mark.parametrize(
    "field",
    [name for name, _ in NUMBERS] + ["dms.decision_shift", "quantize.samples"],
)
def test_a_boolean_is_no_number(field: str) -> None:
    section = field.split(".")[0]
    recipe = "nvfp4_default-kv_nvfp4-calibrated_cr8" if section == "quantize" else "calibrated_cr4"
    changes = {"retrofit.steps": 9} if section == "retrofit" else {}
    for value in (True, False):
        with pytest.raises(RecipeError, match=f"{field}={value}: must be a number"):
            check_recipe(recipe, changes | {field: value})


@pytest.mark.parametrize("field", ["calibrate.curve", "retrofit.cr_range"])
def test_a_boolean_in_a_list_is_no_number(field: str) -> None:
    with pytest.raises(RecipeError, match="must be a number"):
        check_recipe("calibrated_cr4", ["retrofit.steps=9", f"{field}=[true, 2]"])


@pytest.mark.parametrize("value", [1, 0, "yes", "true", 1.0, None])
def test_a_number_or_a_word_is_no_boolean(value: Any) -> None:
    with pytest.raises(RecipeError, match=f"dms.evict={value!r}: must be true or false"):
        check_recipe("calibrated_cr4", {"dms.evict": value})
    with pytest.raises(ValueError, match="must be true or false"):
        DMSConfig(evict=value)


def test_no_boolean_is_assigned_to_a_number() -> None:
    with pytest.raises(ValueError, match="must be a number"):
        DMSConfig(window=True)
    config = DMSConfig()
    with pytest.raises(ValueError, match="must be a number"):
        config.window = True


def bomb() -> str:
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "metadata:\n" + "".join(f"  {line}\n" for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(), "values"),
        ("dms: {window: 4}\ndms: {window: 5}", "'dms' stands twice"),
        ("dms: {window: 4, window: 5}", "'window' stands twice"),
        ("dms: " + "[" * 400 + "]" * 400, "nested deeper"),
        ("dms: &a [*a]", "nested deeper"),
        ("# " + "x" * 300_000, "characters"),
        ("dms: {window: !!set {a}}", "set"),
        ("dms: {[1, 2]: 3}", "a key must be"),
        ("dms: {window: 2020-02-30}", "day is out of range"),
        ("dms: {window: " + "9" * 5000 + "}", "4300 digits"),
        ("dms: {$import: [[]]}", r"dms.\$import=\[\[\]\]"),
        ("imports: {a: 3}", "imports.a=3"),
    ],
)
def test_a_recipe_is_plain_yaml_of_a_size_that_is_meant(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated model with a curve."""
    place = tmp_path_factory.mktemp("saved")
    model, _ = calibrated(
        config={"samples": 8, "held_out": 4, "curve": [1.5, 2.0]}, data=documents(20, shorter=False)
    )
    model.save_pretrained(place)
    return place


def changed(data: Any, path: list[Any], value: Any) -> Any:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["dms_config"], 3, "dms_config=3 must be a mapping"),
        (["dms_config"], {"windo": 3}, "dms_config: windo=3"),
        (["dms_config", "window"], 1e18, "window=1e"),
        (["dms_config", "protect_first"], 10**18, "protect_first=1000000000000000000"),
        (["dms_config", "offset"], float("nan"), "offset=nan"),
        (["dms_config", "threshold"], float("inf"), "threshold=inf"),
        (["dms_curve"], [], "dms_curve"),
        (["dms_curve", "points"], [], "points must be two or more"),
        (["dms_curve", "thresholds"], [[0.0], [0.0]], r"have \[2, 2\] thresholds"),
        (["dms_curve", "points", 1, "shift"], float("nan"), "points.1.shift=nan"),
        (["dms_curve", "length"], 0, "length=0"),
        (["hidden_size"], "wide", "hidden_size"),
        (["num_attention_heads"], 0, "ZeroDivisionError"),
        (["rope_parameters"], [], "rope_parameters"),
        (["dms_quantization"], [3], "mapping"),
    ],
)
def test_a_damaged_config_is_one_error_with_the_directory(
    saved: Path, tmp_path: Path, path: list[Any], value: Any, message: str
) -> None:
    config = json.loads((saved / "config.json").read_text())
    changed(config, path, value)
    for file in saved.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.tensor([float("nan"), 0.0]), WeightError, "dms_gate.threshold holds nan"),
        (torch.tensor([float("inf"), 0.0]), WeightError, "dms_gate.threshold holds inf"),
        (torch.tensor([1e30, 0.0]), WeightError, "dms_gate.threshold holds 1e"),
        (torch.tensor([1, 0]), CheckpointError, "dms_gate.threshold is torch.int64"),
    ],
)
def test_gates_of_a_directory_are_finite_floats(
    value: torch.Tensor, error: type[Exception], message: str, tmp_path: Path
) -> None:
    build_dms("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.dms_gate.threshold"] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_weight_that_is_not_finite_is_named_before_work(value: float, tmp_path: Path) -> None:
    model = build("llama")
    check_weights(model)
    model.model.norm.weight.data[3] = value
    with pytest.raises(WeightError, match="model.norm.weight holds"):
        apply_dms(model, {})
    assert not is_converted(model)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(WeightError, match="model.norm.weight"):
        _load_base(tmp_path / "plain")


def _load_base(place: Path) -> Any:
    from transformers import AutoTokenizer

    from modelopt_dms.config.bundled import embedded_model_dir

    AutoTokenizer.from_pretrained(embedded_model_dir()).save_pretrained(place)
    return load_base(place)


def test_what_was_asked_and_what_was_reached_are_compared() -> None:
    assert missed_ratio(4.0, 3.2, 512) is None
    line = missed_ratio(4.0, 1.0, 512)
    assert line is not None and "asked for a compression ratio of 4, reached 1.00" in line
    model = apply_dms(build("llama"), {"window": 8, "target_cr": 4.0})
    # Of 12 tokens at most 3 can go; of 4096 three quarters should have gone.
    assert ratio_warning(model, 1.0, 12) is None
    line = ratio_warning(model, 1.0, 4096)
    assert line is not None and "asked for a compression ratio of 4, reached 1.00" in line
    assert ratio_warning(build("llama"), 1.0, 4096) is None
    silent = apply_dms(build("llama"), {"window": 8, "evict": False})
    assert ratio_warning(silent, 1.0, 4096) is None
