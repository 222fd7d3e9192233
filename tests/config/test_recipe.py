# SPDX-License-Identifier: Apache-2.0
"""Recipes: what ships loads, changes apply, and a mistake is named with the nearest valid key."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modelopt_dms.config.bundled import RecipeError, list_recipes, recipes_dir
from modelopt_dms.config.recipe import Recipe, load_recipe, recipe_to_yaml
from modelopt_dms.config.recipe_file import check_recipe
from modelopt_dms.config.schema import recipe_schema


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_shipped_recipe_loads_and_reads_well(name: str) -> None:
    text = (recipes_dir() / f"{name}.yaml").read_text()
    assert text.startswith("# ") and len(text.splitlines()) < 40
    recipe = load_recipe(name)
    assert recipe.metadata.description == list_recipes()[name] != ""
    assert recipe.retrofit is not None or recipe.calibrate is not None


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_a_resolved_recipe_reads_back_as_itself(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe_to_yaml(recipe))
    assert load_recipe(path) == recipe


def test_imported_units_are_merged_and_inline_keys_win() -> None:
    retrofit = load_recipe("dms_cr2").retrofit
    assert retrofit is not None
    assert (retrofit.sequence_length, retrofit.steps, retrofit.cr_range) == (8192, 200, [1.5, 4.0])


def test_a_recipe_of_ones_own_can_import_shipped_units_and_units_beside_it(tmp_path: Path) -> None:
    unit = "# modelopt-schema: modelopt.torch.opt.config.ConfigDict\nwindow: 77\n"
    (tmp_path / "mine.yaml").write_text(unit)
    (tmp_path / "recipe.yaml").write_text(
        "imports: {gates: units/retrofit_cr4, facts: mine}\n"
        "dms: {$import: facts, target_cr: 3}\n"
        "retrofit: {$import: gates, steps: 7}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.retrofit is not None
    assert (recipe.dms.window, recipe.dms.target_cr, recipe.retrofit.steps) == (77, 3.0, 7)


@given(window=st.integers(1, 10**6), cr=st.floats(1, 64), seed=st.integers(0, 2**31))
def test_overrides_as_text_and_as_mapping_agree(window: int, cr: float, seed: int) -> None:
    changes = {"dms.window": window, "dms.target_cr": cr, "retrofit.seed": seed}
    recipe = load_recipe(Recipe(retrofit={}), changes)
    assert recipe == load_recipe(Recipe(retrofit={}), [f"{k}={v!r}" for k, v in changes.items()])
    assert (recipe.dms.window, recipe.dms.target_cr) == (window, cr)


def test_overrides_do_not_change_the_recipe_they_start_from() -> None:
    recipe = load_recipe("tiny_cpu")
    before = recipe_to_yaml(recipe)
    load_recipe(recipe, {"dms.window": 3})
    assert recipe_to_yaml(recipe) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dms.windw=3", "unknown key 'dms.windw', did you mean 'window'?"),
        ("retrofitt.steps=3", "unknown key 'retrofitt', did you mean 'retrofit'?"),
        ("retrofit.learning_rat=3", "did you mean 'learning_rate'?"),
        ("dms.window=0", "dms.window=0"),
        ("dms.target_cr=0.5", "dms.target_cr=0.5"),
        ("dms.gate=linear", "'adapter', 'residual' or 'neuron'"),
        ("dms.decision_shift=2", "dms.decision_shift=2"),
        ("retrofit.steps=many", "retrofit.steps='many'"),
        ("retrofit.tau=0", "retrofit.tau=0"),
        ("dms.layers=[]", "layers must name at least one"),
        ("dms=3", "dms=3"),
        ("window", "must read KEY=VALUE"),
        ("dms.window=[", "not a YAML value"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(change: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("dms_cr4", [change])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize: {algoritm: max}", "unknown key 'quantize.algoritm', did you mean 'algorithm'?"),
        ("quantize: {sampels: 3}", "did you mean 'samples'?"),
        (
            "quantize: {quant_cfg: [{quantizer_name: '*', enabel: false}]}",
            "unknown key 'quantize.quant_cfg[0].enabel', did you mean 'enable'?",
        ),
        (
            "quantize: {quant_cfg: [{quantizer_name: '*', cfg: {num_bit: 8}}]}",
            "did you mean 'num_bits'?",
        ),
        ("quantize: {order: first}", "quantize.order='first'"),
        ("export: {format: gguf}", "export.format='gguf'"),
        ("exports: {format: hf}", "unknown key 'exports', did you mean 'export'?"),
        ("metadata: {descripton: x}", "did you mean 'description'?"),
    ],
)
def test_a_mistake_in_any_section_of_a_file_is_named(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_a_resolved_recipe_reads_back_as_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe_to_yaml(recipe))
    assert "$import" not in path.read_text()
    assert load_recipe(path) == recipe


def test_recipes_of_modelopt_load_too() -> None:
    recipe = load_recipe("general/ptq/nvfp4_default-kv_fp8")
    assert recipe.dms is None and recipe.retrofit is None
    assert recipe.quantize is not None and recipe.quantize.algorithm is not None


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'dms_cr5'.*did you mean 'dms_cr"):
        load_recipe("dms_cr5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dms: [", "cannot be read"),
        ("- 1", "must be a YAML mapping"),
        ("imports: {a: no/such/unit}\ndms: {$import: a}", "no/such/unit"),
        ("dms: {$import: a}", "Unknown \\$import reference 'a'"),
    ],
)
def test_a_broken_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "missing.yaml")


def test_the_schema_for_editors_accepts_every_shipped_file_and_refuses_typos() -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    validator.check_schema(recipe_schema())
    for path in recipes_dir().glob("*.yaml"):
        validator.validate(json.loads(json.dumps(yaml.safe_load(path.read_text()))))
    for bad in (
        {"dms": {"windo": 3}},
        {"quantize": {"quant_cfg": [{"quantizer_nam": "*"}]}},
        {"retrofit": {"steps": 0}},
        {"exports": {}},
    ):
        assert not validator.is_valid(bad), bad
    fields = recipe_schema()["$defs"]["DMSConfig"]["properties"]
    assert all(x.get("title") and x.get("description") for k, x in fields.items() if k != "$import")


@pytest.mark.parametrize("name", [*list_recipes(), "general/ptq/fp8_default-kv_fp8"])
def test_what_is_checked_without_modelopt_is_what_its_loader_gives(name: str) -> None:
    quick, whole = check_recipe(name, ["metadata.description=x"]), load_recipe(name)
    for section in ("dms", "calibrate", "retrofit", "export"):
        assert getattr(quick, section) == getattr(whole, section), section
    assert (quick.quantize is None) == (whole.quantize is None)
    if quick.quantize is not None and whole.quantize is not None:
        for key in ("samples", "sample_length", "batch_size", "order"):
            assert getattr(quick.quantize, key) == getattr(whole.quantize, key), key


def test_units_that_import_each_other_are_refused(tmp_path: Path) -> None:
    unit = "# modelopt-schema: modelopt.torch.opt.config.ConfigDict\nimports: {a: %s}\n$import: a\n"
    (tmp_path / "a.yaml").write_text(unit % (tmp_path / "b.yaml"))
    (tmp_path / "b.yaml").write_text(unit % (tmp_path / "a.yaml"))
    (tmp_path / "r.yaml").write_text("imports: {a: a.yaml}\ndms: {$import: a}\n")
    with pytest.raises(RecipeError, match="imports itself"):
        check_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("imports: {a: units/dms_cr4}\ndms: {$import: b}\n")
    with pytest.raises(RecipeError, match=r"\$import='b' does not stand under imports"):
        check_recipe(tmp_path / "r.yaml")
