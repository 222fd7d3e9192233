# SPDX-License-Identifier: Apache-2.0
"""What a plan needs of a recipe: compression ratio, window, number formats. Without ModelOpt or torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from modelopt_dms.config.compression_ratio import (
    check_reachable,
    physical_cr,
    target_evicted_fraction,
)
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.recipe_file import check_recipe
from modelopt_dms.gates.curve import Curve, read_curve
from modelopt_dms.kernels.row_bytes import Number
from modelopt_dms.serving.planner.model_shape import PlanError


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
        source: who says so, for a reader.
        curve: of a compressed model that carries one.
        shift: how far its thresholds are from the curve's shift 0.
    """

    target_cr: float
    window: int
    protect_first: int = 0
    length: int | None = None
    source: str = ""
    curve: Curve | None = None
    shift: float = 0.0

    def evicted_share(self) -> float:
        """Share of the evictable tokens that is evicted, at every length.

        Raises:
            ValueError: target_cr cannot be reached at the length at which it is to be met.
        """
        if self.length is None:
            return 1.0 - 1.0 / self.target_cr
        check_reachable(self.target_cr, self.window, self.length, self.protect_first)
        return target_evicted_fraction(self.target_cr, self.length, self.window, self.protect_first)

    def explain(self, tokens: int) -> str:
        """Why the ratio at this many tokens is another one than target_cr, in a line."""
        share, always = self.evicted_share(), self.window + 1 + self.protect_first
        here = physical_cr(share, tokens, self.window, self.protect_first)
        where = "every length" if self.length is None else f"{self.length:,} tokens"
        line = (
            f"CR: {self.source} {self.target_cr:.3g} at {where}, which evicts {share:.1%} of all but the {always} "
            f"tokens that a head always holds; the same share of {tokens:,} tokens gives {here:.1f}."
        )
        if self.curve is None:
            return f"{line} Other texts get other ratios (docs/capacity.md)."
        low, high = self.curve.expected(self.shift, tokens)
        return f"{line} Expect {low:.1f} to {high:.1f} of other texts of this length."


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
        RecipeError: no such recipe, or one that `compress` would refuse.
    """
    sections = check_recipe(name)
    dms, quantize = sections.dms, sections.quantize
    retention = None
    if dms is not None and dms.evict:
        length = None
        if sections.retrofit is not None:
            length = sections.retrofit.sequence_length
        elif sections.calibrate is not None:
            length = sections.calibrate.sample_length
        retention = Retention(
            dms.target_cr, dms.window, dms.protect_first, length, f"{name} asks for"
        )
    cfg = None if quantize is None else quantize.quant_cfg
    return Planned(str(name), retention, tuple(cfg or ()))


def planned_by_config(name: str, dms: Mapping[str, Any], shift: float = 0.0) -> Planned:
    """What a compressed model does.

    Args:
        name: of the model.
        dms: the DMS fields of its config.json.
        shift: how far its thresholds are from its curve's shift 0.

    Raises:
        CompressionError: its curve is damaged.
    """
    config = dms.get("dms_config")
    retention = None
    if config and config.get("evict", True):
        retention = _retention(name, DMSConfig(**config), dms.get("dms_curve"), shift)
    quantization = dms.get("dms_quantization") or {}
    return Planned(f"{name}'s own", retention, tuple(quantization.get("quant_cfg") or ()))


def _retention(name: str, config: DMSConfig, stored: Any, shift: float) -> Retention:
    """What a compressed model is set to, by its curve; without one, by its recipe."""
    always = (config.window, config.protect_first)
    if not stored:
        return Retention(config.target_cr, *always, None, f"{name}'s recipe asks for")
    curve = read_curve(stored)
    cr = physical_cr(curve.evicted_share(shift), curve.length, *always)
    source = f"{name} gives, by its curve,"
    return Retention(cr, *always, curve.length, source, curve, shift)


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
