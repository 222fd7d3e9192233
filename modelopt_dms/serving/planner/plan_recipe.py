# SPDX-License-Identifier: Apache-2.0
"""What a plan needs of a recipe: compression ratio, window, number formats. Reads YAML only, without ModelOpt or torch.

`config.recipe.load_recipe` checks recipes and is what `compress` obeys; it imports ModelOpt, which takes ten seconds.
tests/serving/test_plan_recipe.py compares both on every shipped recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from modelopt_dms.config.bundled import modelopt_recipes_dir, recipe_path, recipes_dir
from modelopt_dms.config.plain_yaml import read_yaml_file
from modelopt_dms.kernels.row_bytes import Number
from modelopt_dms.serving.planner.model_shape import PlanError

# As in config.dms, config.calibrate and config.retrofit, for recipes that do not say.
_TARGET_CR, _WINDOW, _LENGTH = 4.0, 256, 4096


@dataclass(frozen=True)
class Rows:
    """How keys, or values, are stored.

    Attributes:
        number: of a row.
        per_row: every row has a scale of its own.
    """

    number: Number = "plain"
    per_row: bool = False


@dataclass(frozen=True)
class Retention:
    """Which tokens stay.

    Attributes:
        target_cr: context over resident tokens, at `length`.
        window: delay window W.
        protect_first: P.
        length: tokens at which target_cr is met; None: the evicted share is 1 - 1/target_cr at every length.
    """

    target_cr: float
    window: int
    protect_first: int = 0
    length: int | None = None


@dataclass(frozen=True)
class Planned:
    """What a recipe, or a compressed model, does.

    Attributes:
        name: for readers.
        retention: None without DMS.
        quant_cfg: ModelOpt's list of quantizers; empty if nothing is quantized.
    """

    name: str
    retention: Retention | None
    quant_cfg: tuple[Mapping[str, Any], ...] = ()


def planned_by_recipe(name: str) -> Planned:
    """What a recipe does.

    Raises:
        RecipeError: no such recipe.
        PlanError: it cannot be read.
    """
    path = recipe_path(name)
    data = _resolved(path, frozenset())
    if not isinstance(data, dict):
        raise PlanError(f"recipe {path} must be a YAML mapping")
    quantize = data.get("quantize") or {}
    gated = "dms" in data or "calibrate" in data or "retrofit" in data or not quantize
    retention = None
    if gated and (data.get("dms") or {}).get("evict", True):
        retention = _retention(data)
    return Planned(str(name), retention, tuple(quantize.get("quant_cfg") or ()))


def planned_by_config(name: str, dms: Mapping[str, Any]) -> Planned:
    """What a compressed model does, by the fields of its config.json."""
    config = dms.get("dms_config")
    retention = None
    if config and config.get("evict", True):
        curve = dms.get("dms_curve") or {}
        retention = Retention(
            config.get("target_cr", _TARGET_CR),
            config.get("window", _WINDOW),
            config.get("protect_first", 0),
            curve.get("length"),
        )
    quantization = dms.get("dms_quantization") or {}
    return Planned(name, retention, tuple(quantization.get("quant_cfg") or ()))


def kv_rows(planned: Planned) -> tuple[Rows, Rows]:
    """How keys and values are stored.

    Raises:
        PlanError: in a way that the cache does not know.
    """
    keys, values = (_rows(_cfg_of(planned, f"self_attn.{x}_bmm_quantizer")) for x in "kv")
    return keys, values


def weight_bits(planned: Planned, module: str) -> float | None:
    """Bits a weight of a linear layer, scales included; None if it is not quantized.

    Args:
        planned: what is done.
        module: name of the layer within a decoder layer, for example "mlp.up_proj".
    """
    cfg = _cfg_of(planned, f"{module}.weight_quantizer")
    if cfg is None:
        return None
    number, blocks = _number(cfg), _blocks(cfg)
    bits = {"fp8": 8.0, "int8": 8.0, "fp4": 4.0, "int4": 4.0}[number]
    if blocks:
        bits += (8 if cfg["block_sizes"].get("scale_bits") else 16) / blocks
    return bits


def products(planned: Planned, module: str) -> str:
    """The number format in which a linear layer is multiplied: bf16 unless weights and activations are quantized."""
    weights = _cfg_of(planned, f"{module}.weight_quantizer")
    inputs = _cfg_of(planned, f"{module}.input_quantizer")
    if weights is None or inputs is None:
        return "bf16"
    numbers = {_number(weights), _number(inputs)}
    return numbers.pop() if len(numbers) == 1 else "bf16"


def _cfg_of(planned: Planned, quantizer: str) -> Mapping[str, Any] | None:
    """The attributes that a quantizer ends up with: of all entries that match, the last one's; None if it is off."""
    found: Mapping[str, Any] | None = None
    for entry in planned.quant_cfg:
        if entry.get("parent_class") or not _matches(quantizer, entry["quantizer_name"]):
            continue
        cfg = entry.get("cfg")
        if isinstance(cfg, list):
            cfg = cfg[0]
        if entry.get("enable") is False or (cfg or {}).get("enable") is False:
            found = None
        elif cfg is not None:
            found = cfg
    return found


def _matches(quantizer: str, pattern: str) -> bool:
    return fnmatch(f"model.layers.0.{quantizer}", pattern)


def _number(cfg: Mapping[str, Any]) -> str:
    bits = cfg.get("num_bits", 8)
    if isinstance(bits, (list, tuple)):
        bits = f"e{bits[0]}m{bits[1]}"
    known = {"e4m3": "fp8", "e2m1": "fp4", 8: "int8", 4: "int4"}
    if bits not in known:
        raise PlanError(
            f"num_bits={bits!r} is not planned for; accepted: {', '.join(map(str, known))}"
        )
    return known[bits]


def _blocks(cfg: Mapping[str, Any]) -> int:
    sizes = cfg.get("block_sizes") or {}
    return int(sizes.get(-1) or sizes.get("-1") or 0)


def _rows(cfg: Mapping[str, Any] | None) -> Rows:
    if cfg is None:
        return Rows()
    number = _number(cfg)
    if number == "fp4":
        return Rows("nvfp4")
    if number not in ("fp8", "int8") or _blocks(cfg):
        raise PlanError(f"the KV cache cannot store {dict(cfg)}; accepted: fp8, int8, nvfp4")
    dynamic = cfg.get("type") == "dynamic" and not cfg.get("use_constant_amax")
    return Rows("fp8" if number == "fp8" else "int8", dynamic)


def _retention(data: Mapping[str, Any]) -> Retention:
    dms, calibrate, retrofit = (data.get(x) or {} for x in ("dms", "calibrate", "retrofit"))
    length = None
    if "retrofit" in data:
        length = retrofit.get("sequence_length", _LENGTH)
    elif "calibrate" in data:
        length = calibrate.get("sample_length", _LENGTH)
    return Retention(
        dms.get("target_cr", _TARGET_CR),
        dms.get("window", _WINDOW),
        dms.get("protect_first", 0),
        length,
    )


def _resolved(path: Path, above: frozenset[Path]) -> Any:
    """The value of a YAML file with its imports filled in, as ModelOpt's loader does it."""
    if path in above:
        raise PlanError(f"recipe {path} imports itself")
    try:
        documents = read_yaml_file(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"recipe {path} cannot be read: {error}") from error
    header = documents[0] if documents and isinstance(documents[0], dict) else {}
    body = documents[-1] if documents else {}
    if len(documents) > 1 and isinstance(body, dict):
        body = {**header, **body}
    units = {
        name: _resolved(_unit(unit, path), above | {path})
        for name, unit in (header.get("imports") or {}).items()
    }
    if isinstance(body, dict):
        body = {key: x for key, x in body.items() if key != "imports"}
    return _filled(body, units, path)


def _unit(name: str, beside: Path) -> Path:
    file = name if str(name).endswith((".yaml", ".yml")) else f"{name}.yaml"
    for root in (beside.parent, recipes_dir(), modelopt_recipes_dir()):
        if (root / file).is_file():
            return (root / file).resolve()
    raise PlanError(f"{beside} imports {name}, which does not exist")


def _filled(value: Any, units: Mapping[str, Any], path: Path) -> Any:
    if isinstance(value, dict):
        if "$import" not in value:
            return {key: _filled(x, units, path) for key, x in value.items()}
        merged: dict[Any, Any] = {}
        for name in _names(value["$import"]):
            unit = _looked_up(name, units, path)
            if not isinstance(unit, dict):
                raise PlanError(f"{path}: $import {name!r} must name a mapping here")
            merged |= unit
        merged |= {key: x for key, x in value.items() if key != "$import"}
        return _filled(merged, units, path)
    if isinstance(value, list):
        return [x for entry in value for x in _entries(entry, units, path)]
    return value


def _entries(entry: Any, units: Mapping[str, Any], path: Path) -> list[Any]:
    """A list's entry, or what a bare import puts in its place."""
    if isinstance(entry, dict) and list(entry) == ["$import"] and isinstance(entry["$import"], str):
        unit = _looked_up(entry["$import"], units, path)
        return unit if isinstance(unit, list) else [unit]
    return [_filled(entry, units, path)]


def _names(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _looked_up(name: Any, units: Mapping[str, Any], path: Path) -> Any:
    if name not in units:
        raise PlanError(f"{path}: $import {name!r} is not among its imports")
    return units[name]
