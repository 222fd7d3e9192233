# SPDX-License-Identifier: Apache-2.0
"""The planner, without ModelOpt, reads recipes as `compress` does, on every recipe that is shipped."""

from pathlib import Path
from typing import Any

import pytest
from families import build
from modelopt.torch.quantization.nn import TensorQuantizer

from modelopt_dms.config.bundled import RecipeError, list_recipes, modelopt_recipes_dir
from modelopt_dms.config.quantize import quantization_to_dict
from modelopt_dms.config.recipe import load_recipe
from modelopt_dms.quantization.apply import insert
from modelopt_dms.serving.planner.plan_recipe import planned_by_recipe, weight_bits

THEIRS = sorted(
    str(x.relative_to(modelopt_recipes_dir()).with_suffix(""))
    for x in (modelopt_recipes_dir() / "general" / "ptq").glob("*default-*.yaml")
)


def plainly(value: Any) -> Any:
    """Without what differs in writing only: e4m3 for (4, 3), text for integer keys, fields that are not set."""
    if isinstance(value, dict):
        found = {str(key): plainly(x) for key, x in value.items() if key != "effective_bits"}
        return {key: x for key, x in found.items() if x is not None}
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and all(isinstance(x, int) for x in value):
            return f"e{value[0]}m{value[1]}"
        return [plainly(x) for x in value]
    return value


@pytest.mark.parametrize("name", [*list_recipes(), *THEIRS])
def test_a_recipe_is_read_as_compress_reads_it(name: str) -> None:
    expected, found = load_recipe(name), planned_by_recipe(name)
    if expected.dms is None:
        assert found.retention is None
    else:
        assert found.retention is not None
        got = (found.retention.target_cr, found.retention.window, found.retention.protect_first)
        dms = expected.dms
        assert got == (dms.target_cr, dms.window, dms.protect_first)
        fits = expected.retrofit or expected.calibrate
        length = getattr(fits, "sequence_length", getattr(fits, "sample_length", None))
        assert found.retention.length == length
    quantize = expected.quantize
    theirs = [] if quantize is None else quantization_to_dict(quantize)["quant_cfg"]
    ours = [dict(x) for x in found.quant_cfg]
    assert [plainly(_entry(x)) for x in ours] == [plainly(_entry(x)) for x in theirs]


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    """What the plan reads of a quantizer."""
    cfg = entry.get("cfg")
    first = (cfg[0] if isinstance(cfg, list) else cfg) or {}
    kept = ("num_bits", "block_sizes", "type", "enable", "use_constant_amax")
    return {
        "name": entry["quantizer_name"],
        "on": entry.get("enable"),
        "parent": entry.get("parent_class"),
        "cfg": {key: first[key] for key in kept if key in first},
    }


@pytest.mark.parametrize(
    "name", ["fp8_default-kv_fp8-dms_cr8", "nvfp4_weight_only-kv_fp8-dms_cr8", "kv_int8-dms_cr8"]
)
def test_linear_layers_that_modelopt_quantizes_are_those_that_are_counted(name: str) -> None:
    model = build("llama")
    quantize = load_recipe(name).quantize
    assert quantize is not None
    insert(model, quantize)
    planned = planned_by_recipe(name)
    quantizers = dict(model.named_modules())
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        quantizer = quantizers[f"model.layers.0.{module}.weight_quantizer"]
        assert isinstance(quantizer, TensorQuantizer)
        assert quantizer.is_enabled == (weight_bits(planned, module) is not None)


def test_a_recipe_that_imports_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"imports: {{x: {path}}}\ndms: {{$import: x}}\n")
    with pytest.raises(RecipeError, match="imports itself"):
        planned_by_recipe(str(path))
