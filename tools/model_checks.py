# SPDX-License-Identifier: Apache-2.0
"""What a converted model must have in common with the plain one, and its paths with each other, on a tiny model."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_configs import TEXT_VOCABULARY, architectures, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.gates.gate import eviction_off
from modelopt_dms.modeling.convert import dms_modules, plan_conversion
from modelopt_dms.modeling.mode import apply_dms

ROOT = Path(__file__).resolve().parent.parent
WINDOW, LENGTH, SHORTER = 5, 24, 17
# Largest difference of logits, relative to the largest logit.
LIMITS = {"off": 1e-5, "image": 1e-5, "cached": 1e-4, "padded": 1e-4, "reloaded": 0.0}

IN_A_FRESH_PROCESS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
import modelopt_dms
for path in map(Path, sys.argv[1:]):
    given = load_file(path / "expected" / "logits.safetensors")
    try:
        with torch.no_grad():
            found = modelopt_dms.load(path)(input_ids=given["ids"], use_cache=False).logits
        result = (found - given["logits"]).abs().max().item()
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    print("RESULT", json.dumps([path.name, result]), flush=True)
"""


@dataclass
class Row:
    """One architecture.

    Attributes:
        name: model type.
        cls: its class in transformers.
        result: "exact", "refused", "not built" or "deviates".
        why: one line, unless it is exact.
        converted: how many layers have a gate.
        left_alone: why other attention layers have none, without their names.
        differences: by the names of LIMITS.
        rounding: between the plain model's SDPA and eager attention.
        padded_plain: the plain model's own difference under padding.
    """

    name: str
    cls: str
    result: str = ""
    why: str = ""
    converted: int = 0
    left_alone: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    rounding: float = 0.0
    padded_plain: float = 0.0

    def limit(self, check: str) -> float:
        """What a difference may be: more where the plain model itself depends on rounding or on padding."""
        own = {"off": 5 * self.rounding, "image": 5 * self.rounding, "cached": 5 * self.rounding}
        return max(
            LIMITS[check], own.get(check, 3 * self.padded_plain if check == "padded" else 0.0)
        )


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ids [batch, length] of text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, TEXT_VOCABULARY, (batch, length), generator=generator)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest number of b."""
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return (a - b).abs().max().item() / b.abs().max().item()


@dataclass
class Plain:
    """The untouched model with transformers' eager attention, and what it computes."""

    model: Any
    ids: Tensor
    off: list[Tensor]  # logits [B, T, V] of the ids: whole, with a cache, and in chunks
    padded: float
    image: dict[str, Tensor] | None


@torch.no_grad()
def check(name: str, save_to: Path) -> Row:
    """Try one architecture of `architectures()`; what must load bit-exactly later is written to `save_to`/name."""
    row = Row(name, architectures()[name])
    try:
        plain = _plain(name)
    except Exception as error:
        return _ended(row, "not built", error)
    try:
        model = apply_dms(tiny_model(name), {"window": WINDOW, "offset": 0.0, "scale": 10.0})
    except ValueError as error:
        return _ended(row, "refused", error)
    row.converted = len(dms_modules(model))
    _, left = plan_conversion(plain.model, DMSConfig())
    row.left_alone = sorted(set(left.values()))
    try:
        _compare(row, plain, model)
        place = save_to / row.name.replace(":", "_")
        model.save_pretrained(place)
        (place / "expected").mkdir()
        full = model(input_ids=plain.ids, use_cache=False).logits
        save_file({"ids": plain.ids, "logits": full}, place / "expected" / "logits.safetensors")
    except Exception as error:
        return _ended(row, "deviates", error)
    return row


def _plain(name: str) -> Plain:
    """The plain model's results; whatever it cannot do is no fault of a conversion."""
    model, ids = tiny_model(name), tokens(2, LENGTH)
    if type(model)._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    found = Plain(model, ids, [model(input_ids=ids, use_cache=False).logits], 0.0, None)
    if not found.off[0].isfinite().all():
        raise ValueError("the tiny model's logits are not finite")
    if type(model)._can_set_attn_implementation():
        found.off += _cached(model, ids)
        found.padded = _padding(model, ids)
        found.image = image_inputs(model)
    return found


def _ended(row: Row, result: str, error: Exception) -> Row:
    row.result, row.why = result, " ".join(str(error).split())
    if not isinstance(error, ValueError):
        row.why = f"{type(error).__name__}: {row.why}"
    return row


def _compare(row: Row, plain: Plain, model: Any) -> None:
    ids = plain.ids
    open_gates(model)
    with eviction_off(model):
        off = [model(input_ids=ids, use_cache=False).logits, *_cached(model, ids)]
        # Some models amplify rounding: SDPA in the place of eager attention differs, too.
        rounding = copy.deepcopy(plain.model)
        if rounding._supports_sdpa:
            rounding.set_attn_implementation("sdpa")
            row.rounding = distance(rounding(input_ids=ids, use_cache=False).logits, plain.off[0])
        if plain.image is not None:
            row.differences["image"] = distance(
                model(**plain.image, use_cache=False).logits,
                plain.model(**plain.image, use_cache=False).logits,
            )
            _forget_image(model)
    row.differences["off"] = max(distance(x, y) for x, y in zip(off, plain.off, strict=True))
    full = model(input_ids=ids, use_cache=False).logits
    assert distance(full, plain.off[0]) > 1e-3, "eviction changes nothing"
    row.differences["cached"] = distance(_fed(model, ids, [10] + [1] * (LENGTH - 10)), full)
    row.differences["padded"] = _padding(model, ids)
    row.padded_plain = plain.padded


def _forget_image(model: Any) -> None:
    """Text after an image gets that image's positions: transformers keeps them in the model until the next one."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None


def _cached(model: Any, ids: Tensor) -> list[Tensor]:
    return [model(input_ids=ids, use_cache=True).logits, _fed(model, ids, [10, 1, 9, 4])]


def _fed(model: PreTrainedModel, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits [B, T, V] of ids [B, T] fed in chunks of these sizes through a cache."""
    logits, cache = [], None
    for chunk in ids.split(sizes, dim=1):
        out = model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def _padding(model: Any, ids: Tensor) -> float:
    """Difference of a generation in a left-padded batch from the same without padding."""
    mask = torch.ones_like(ids)
    mask[1, : LENGTH - SHORTER] = 0
    both = _generated(model, ids * mask, mask)
    found = 0.0
    for row, length in enumerate((LENGTH, SHORTER)):
        alone = _generated(
            model, ids[row : row + 1, LENGTH - length :], mask[row : row + 1, LENGTH - length :]
        )
        for step in range(alone.shape[1]):
            found = max(found, distance(both[row, step], alone[0, step]))
            if both[row, step].argmax() != alone[0, step].argmax():
                break
    return found


def _generated(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, 6, V] of a greedy continuation."""
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits, dim=1)


def open_gates(model: PreTrainedModel) -> None:
    """Random weights for all gates, and thresholds that half of some random tokens exceed."""
    generator = torch.Generator().manual_seed(0)
    hidden: dict[nn.Module, Tensor] = {}

    def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden[module] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    modules = dms_modules(model).values()
    hooks = [x.register_forward_pre_hook(remember, with_kwargs=True) for x in modules]
    with eviction_off(model):
        model(input_ids=tokens(4, 64, seed=1), use_cache=False)
    for hook in hooks:
        hook.remove()
    for module in modules:
        module.dms_gate.weight.data.normal_(std=0.1, generator=generator)
        z = module.dms_gate.logits(hidden[module]).transpose(0, 1).flatten(1).sort().values
        # The widest gap near the middle: rounding must not flip a decision.
        middle = z[:, int(z.shape[1] * 0.45) : int(z.shape[1] * 0.55)]
        widest = middle.diff().argmax(1, keepdim=True)
        module.dms_gate.threshold.copy_(
            (middle.gather(1, widest) + middle.gather(1, widest + 1))[:, 0] / 2
        )


def reload(rows: list[Row], saved: Path) -> None:
    """Load what `check` wrote in a fresh process, and settle what every row's result is."""
    paths = {row.name.replace(":", "_"): row for row in rows if not row.result}
    found = {}
    if paths:
        arguments = [sys.executable, "-W", "ignore", "-c", IN_A_FRESH_PROCESS]
        arguments += [str(saved / x) for x in paths]
        run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = [x for x in run.stdout.splitlines() if x.startswith("RESULT ")]
        found = dict(json.loads(x.removeprefix("RESULT ")) for x in lines)
    for name, row in paths.items():
        result = found.get(name, "the process that loads it died")
        if isinstance(result, str):
            row.result = "deviates"
            row.why = " ".join(f"saved, but cannot be loaded: {result}".split())
            continue
        row.differences["reloaded"] = result
        beyond = {key: x for key, x in row.differences.items() if x > row.limit(key)}
        row.result = "deviates" if beyond else "exact"
        row.why = ", ".join(f"{key}: {x:.1e}" for key, x in beyond.items())


def image_inputs(model: Any) -> dict[str, Tensor] | None:
    """Text with an image in it that a multimodal model reads; None if it is none, or needs more than is tried here."""
    encode = getattr(model, "get_image_features", None)
    token = next(
        (
            x
            for name in ("image_token_id", "image_token_index")
            if (x := getattr(model.config, name, None)) is not None
        ),
        None,
    )
    if encode is None or token is None:
        return None
    for pixels in _pixels(model.config):
        try:
            features = encode(**pixels)
            features = getattr(features, "pooler_output", features)
            if isinstance(features, (list, tuple)):
                features = torch.cat([x.flatten(0, -2) for x in features])
            count = features.flatten(0, -2).shape[0]
            text = tokens(1, 12)
            ids = torch.cat([text[:, :6], torch.full((1, count), token), text[:, 6:]], dim=1)
            types = (ids == token).long()
            for extra in ({}, {"token_type_ids": types}, {"mm_token_type_ids": types}):
                inputs = {"input_ids": ids, **pixels, **extra}
                try:
                    logits = model(**inputs, use_cache=False).logits
                except Exception:
                    continue
                blank = {**inputs, "pixel_values": torch.zeros_like(pixels["pixel_values"])}
                if distance(model(**blank, use_cache=False).logits, logits) > 1e-4:
                    return inputs
        except Exception:
            continue
    return None


def _pixels(config: Any) -> list[dict[str, Tensor]]:
    """One random image in the layouts that encoders take."""
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", 16), getattr(vision, "patch_size", 4)
    side = size if isinstance(size, int) else 16
    patch = patch if isinstance(patch, int) else 4
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(1, 3, side, side, generator=generator)
    sizes = torch.tensor([[side, side]])
    grid = torch.tensor([[1, 4, 4]])
    frames = getattr(vision, "temporal_patch_size", 2) or 2
    rows = torch.randn(16, 3 * frames * patch * patch, generator=generator)
    single = torch.randn(16, 3, patch, patch, generator=generator)
    return [
        {"pixel_values": square},
        {"pixel_values": square, "image_sizes": sizes},
        {"pixel_values": square[None], "image_sizes": sizes},
        {"pixel_values": square[None]},
        {"pixel_values": rows, "image_grid_thw": grid},
        {"pixel_values": single, "image_grid_thw": grid},
    ]
