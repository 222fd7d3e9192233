# SPDX-License-Identifier: Apache-2.0
"""What commands start from: models, tokenizers and data, checked as far as names go. Prints nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_dms.checkpoints import base
from modelopt_dms.checkpoints.gguf import gguf_file
from modelopt_dms.cli.options import Dtype
from modelopt_dms.config import distributed
from modelopt_dms.data.inputs import Blend, Formatted, as_paths, parse_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_model(name: str | Path) -> str:
    """Where MODEL lies; what is no model by its files or its header is refused before anything heavy is imported."""
    place = base.locate(name)
    base.check_model_place(place)
    return place


def check_compressed(name: Path) -> Path:
    """The same for a command that needs a compressed model."""
    place = Path(check_model(name))
    if gguf_file(place) is not None:
        raise ValueError(f"{name} is a plain model, without gates; compress it first")
    return place


def load_base(
    place: str, dtype: Dtype, device: str | None, trust: bool
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A plain causal LM and its tokenizer; bars of the weights are switched off."""
    _hide_bars()
    _check_device(device)
    return base.load_base(place, dtype=dtype.value, device_map=device, trust_remote_code=trust)


def _check_device(device: str | None) -> None:
    """Refuse a CUDA device that is not there, before weights are read."""
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
    from transformers import AutoConfig

    from modelopt_dms.checkpoints.load import load

    config = AutoConfig.from_pretrained(place, trust_remote_code=trust)
    if not any(hasattr(config, x) for x in ("dms_config", "dms_quantization", "dms_window_size")):
        return load_base(place, dtype, device, trust)
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
