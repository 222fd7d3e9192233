# SPDX-License-Identifier: Apache-2.0
"""What commands start from: models, tokenizers and data, checked as far as names go. Prints warnings only."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_dms.checkpoints import base
from modelopt_dms.checkpoints.fetch import KNOWN
from modelopt_dms.checkpoints.formats import is_ours, read_json
from modelopt_dms.checkpoints.gguf import AUTO_DTYPE, gguf_file, read_header
from modelopt_dms.cli.options import Dtype, warn
from modelopt_dms.config import distributed
from modelopt_dms.config.compression_ratio import rounded_down
from modelopt_dms.config.progress import phase
from modelopt_dms.data.inputs import Blend, Formatted, as_paths, parse_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modelopt_dms.config.sections import Sections

_COLDEST, _HOTTEST = 0.001, 1000.0
_DEVICE = re.compile(
    r"(?:cpu|cuda|mps|xpu|npu|hpu)(?::\d+)?|auto|balanced|balanced_low_0|sequential"
)


def check_model(name: str | Path) -> str:
    """Where MODEL lies; what is no model by its files or its header is refused before anything heavy is imported."""
    place = base.locate(name)
    base.check_model_place(place)
    return place


def check_compressed(name: Path) -> Path:
    """The same for a command that needs a compressed or a quantized model."""
    if str(name) not in (base.EMBEDDED, *KNOWN) and not name.exists():
        raise ValueError(f"{name} does not exist; expected the directory of a compressed model")
    place = Path(check_model(name))
    if gguf_file(place) is not None or (place.is_dir() and not is_ours(place)):
        raise ValueError(
            f"{name} is a plain model, without gates; compress it first: modelopt-dms compress {name} -o OUTPUT"
        )
    return place


def check_original(place: str, sections: "Sections") -> None:
    """Refuse to do to a model again what its config.json says has been done to it."""
    config = read_json(Path(place) / "config.json")
    if sections.dms is not None and _has_gates(config):
        raise ValueError(f"{place} already has DMS gates; start from the original checkpoint")
    if config.get("dms_quantization"):
        raise ValueError(f"{place} is quantized already; start from the original checkpoint")


def check_gates(name: str | Path, place: str | Path, option: str) -> None:
    """Refuse an option that compares a model with its full cache, for a model without gates, if it lies here."""
    if Path(place).exists() and (
        gguf_file(place) is not None or not _has_gates(read_json(Path(place) / "config.json"))
    ):
        raise no_gates(name, option)


def no_gates(name: str | Path, option: str) -> ValueError:
    """The error where there is nothing to compare; of a model on the hub it is known when it is loaded."""
    return ValueError(f"{option}: {name} has no gates, so it is its own full cache")


def _has_gates(config: dict[str, Any]) -> bool:
    return any(config.get(x) for x in ("dms_config", "dms_window_size"))


def check_curve(place: str | Path) -> None:
    """Refuse a model that carries no curve, if it is a directory here."""
    if Path(place).is_dir() and read_json(Path(place) / "config.json").get("dms_curve") is None:
        raise ValueError(
            f"{place} carries no curve from thresholds to compression ratios; compress the original model, with data, "
            "by a recipe that calibrates or retrofits"
        )


def longest_context(place: str) -> int | None:
    """Tokens of the longest context that a model says it can read, if it is here and says so."""
    if (file := gguf_file(place)) is not None:
        header = read_header(file)
        found = header.metadata.get(f"{header.architecture}.context_length")
    else:
        config = read_json(Path(place) / "config.json")
        inner = config.get("text_config")
        found = config.get("max_position_embeddings") or (
            inner.get("max_position_embeddings") if isinstance(inner, dict) else None
        )
    return found if isinstance(found, int) else None


def beyond_model(place: str, tokens: int, what: str) -> str | None:
    """A line for who asks for more tokens than a model was made for, whose answers then mean little; None otherwise."""
    longest = longest_context(place)
    if longest is None or tokens <= longest:
        return None
    return f"{what}: {tokens:,} tokens, and {place} was made for {longest:,}: what lies beyond means little"


def stored_dtype(place: str, dtype: Dtype) -> str | None:
    """The dtype that a model will be loaded in, if that can be told from here."""
    if dtype is not Dtype.auto:
        return dtype.value
    if gguf_file(place) is not None:
        return AUTO_DTYPE
    config = read_json(Path(place) / "config.json")
    found = config.get("dtype") or config.get("torch_dtype")
    return found if isinstance(found, str) else None


def check_ratio(place: str | Path, cr: float | None) -> None:
    """Refuse to set a model to a compression ratio if it carries no curve, or one that does not reach so far."""
    if cr is None or not Path(place).exists():
        return
    if gguf_file(place) is not None:
        raise ValueError(f"--cr {cr:g}: {place} is a plain model, without gates; compress it first")
    check_curve(place)
    curve = read_json(Path(place) / "config.json")["dms_curve"]
    try:
        highest = max(float(x["compression_ratio"]) for x in curve["points"])
    except (LookupError, TypeError, ValueError):
        return  # damaged: loading says how
    if not 1.0 <= cr <= highest + 1e-6:
        raise ValueError(
            f"--cr {cr:g}: {place} can be set to 1 to {rounded_down(highest)}, which is what was measured"
        )


def load_base(
    place: str, dtype: Dtype, device: str | None, trust: bool
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A plain causal LM and its tokenizer; bars of the weights are switched off."""
    with phase("load"):
        _hide_bars()
        _check_device(device)
        found = base.load_base(place, dtype=dtype.value, device_map=device, trust_remote_code=trust)
    warn(base.slow_dtype(found[0]))
    return found


def check_temperature(value: float) -> None:
    """Refuse temperatures that make infinite or equal logits of any."""
    if not (value == 0 or _COLDEST <= value <= _HOTTEST):
        raise ValueError(
            f"--temperature {value:g} must be 0 (greedy), or from {_COLDEST:g} to {_HOTTEST:g}"
        )


def check_device(device: str | None) -> None:
    """Refuse what is no device, and a CUDA device that is not there, without asking torch."""
    if device is None:
        return
    if not _DEVICE.fullmatch(device):
        raise ValueError(
            f"--device {device} is no device; accepted: cpu, cuda, cuda:0 and so on, mps, xpu, auto, balanced, "
            "balanced_low_0, sequential"
        )
    if not device.startswith("cuda"):
        return
    try:
        build = version("torch")
    except PackageNotFoundError:  # built from source without metadata
        return
    nodes = any(Path("/dev").glob(x) for x in ("nvidia[0-9]*", "dxg", "kfd"))
    if build.endswith("+cpu") or (sys.platform == "linux" and not nodes):
        raise ValueError(
            f"--device {device}: this machine has no CUDA device, or torch ({build}) is a CPU build"
        )


def _check_device(device: str | None) -> None:
    """The same, and what only torch knows."""
    check_device(device)
    import torch

    if (device or "").startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device}: this machine has no CUDA device, or torch is a CPU build"
        )


def load_tokenizer(place: str, trust: bool) -> "PreTrainedTokenizerBase":
    """A tokenizer, by its own place or its model's; bars of the weights that follow are switched off."""
    _hide_bars()
    return base.load_tokenizer(place, trust_remote_code=trust)


def load_any(
    place: str, dtype: Dtype, device: str | None, trust: bool
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A compressed model, or a plain one to compare it with; and its tokenizer."""
    if gguf_file(place) is not None:
        return load_base(place, dtype, device, trust)
    with phase("load"):
        found = _load_any(place, dtype, device, trust)
    warn(base.slow_dtype(found[0]))
    return found


def _load_any(
    place: str, dtype: Dtype, device: str | None, trust: bool
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    from transformers import AutoConfig

    from modelopt_dms.checkpoints.load import load

    config = AutoConfig.from_pretrained(place, trust_remote_code=trust)
    if not any(hasattr(config, x) for x in ("dms_config", "dms_quantization", "dms_window_size")):
        _hide_bars()
        _check_device(device)
        return base.load_base(place, dtype=dtype.value, device_map=device, trust_remote_code=trust)
    _check_device(device)
    tokenizer = load_tokenizer(place, trust)
    return load(place, dtype=dtype.value, device_map=device, trust_remote_code=trust), tokenizer


def _hide_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def set_ratio(model: "PreTrainedModel", cr: float | None) -> None:
    """Have a model run at a compression ratio, if one is asked for."""
    if cr is not None:
        from modelopt_dms.gates.thresholds import set_compression

        set_compression(model, cr)


def embedded_documents(tokenizer: "PreTrainedTokenizerBase", recipe: Any) -> list[list[int]]:
    """The embedded model's own kind of text, enough for the recipe."""
    from modelopt_dms.evaluation.tasks import training_documents

    retrofit, calibrate, quantize = recipe.retrofit, recipe.calibrate, recipe.quantize
    counts, lengths = [0], [8]
    if retrofit is not None:
        counts.append(min(retrofit.visits(distributed.count()), 2048) + 32)
        lengths.append(retrofit.sequence_length)
    if calibrate is not None:
        counts.append(calibrate.samples + calibrate.held_out)
        lengths.append(calibrate.sample_length)
    if quantize is not None:
        counts.append(quantize.samples)
        lengths.append(quantize.sample_length)
    seed = 0 if retrofit is None else retrofit.seed
    return [x.ids for x in training_documents(tokenizer, max(counts), max(lengths), seed)]


def open_data(arguments: list[str] | None, format: str | None = None) -> Any:
    """What --data name, checked as far as names and the first records go; None if there are none."""
    if format is not None and not arguments:
        raise ValueError(f"--format {format} says how --data is read, and there is no --data")
    found = parse_data(arguments or [], format)
    sources = [source for source, _ in found.parts] if isinstance(found, Blend) else [found]
    for source in sources:
        _check_files(as_paths(source), "--data", format)
    return found or None


def open_files(paths: list[Path], option: str, format: str | None) -> Any:
    """Files without weights, checked likewise; `option` names them."""
    if format is not None and not paths:
        raise ValueError(f"--format {format} says how {option} is read, and there is no {option}")
    _check_files(paths, option, format)
    return paths if format is None else Formatted(paths, format)


def _check_files(paths: list[Path], option: str, format: str | None) -> None:
    # Imported late: numpy and pyarrow.
    from modelopt_dms.data.files import check_start

    for path in paths:
        if not path.is_file():
            raise ValueError(f"{option} {path} does not exist or is not a file")
        if path.stat().st_size == 0:
            raise ValueError(f"{option} {path} is empty")
        check_start(path, format)
