# SPDX-License-Identifier: Apache-2.0
"""A name, a directory or a GGUF file -> a plain causal LM and its tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_dms.checkpoints import gguf
from modelopt_dms.checkpoints.fetch import KNOWN, fetched
from modelopt_dms.checkpoints.formats import check_plain
from modelopt_dms.config.bundled import embedded_model_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
# One of these is in every directory that a tokenizer can be read from; of none, transformers makes up an empty one.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "tekken.json")


def load_base(
    name_or_path: str | Path,
    *,
    dtype: "torch.dtype | str" = "auto",
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load what is to be compressed, and its tokenizer.

    Args:
        name_or_path: a directory, a .gguf file, a hub id, "embedded", or the name of a fetched model ("smollm2").
        dtype: of the weights; "auto" is the checkpoint's own, and bfloat16 for GGUF.
        device_map: as in `from_pretrained`.
        trust_remote_code: as in `from_pretrained`; off unless asked for.

    Raises:
        ValueError: not here, damaged, no causal LM, or with a weight that is not finite.
    """
    place = locate(name_or_path)
    check_model_place(place)
    tokenizer = load_tokenizer(place, trust_remote_code=trust_remote_code)
    if (file := gguf.gguf_file(place)) is not None:
        model = gguf.load_model(file, dtype=dtype, device_map=device_map)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
        ).eval()
    from modelopt_dms.modeling.finite import check_weights

    check_weights(model, place)
    return model, tokenizer


def load_tokenizer(
    name_or_path: str | Path, *, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """A tokenizer, by its own place or its model's."""
    place = locate(name_or_path)
    if (file := gguf.gguf_file(place)) is not None:
        return gguf.load_tokenizer(file)
    _check_tokenizer(Path(place))
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        place, trust_remote_code=trust_remote_code
    )
    return tokenizer


def locate(name_or_path: str | Path) -> str:
    """Where a model lies: what was given, unless it is the name of the embedded model or of a fetched one.

    Raises:
        FetchError: a known model that is not here yet, or damaged.
    """
    name = str(name_or_path)
    if name == EMBEDDED:
        return str(embedded_model_dir())
    # As in transformers, what lies here comes first: it may be somebody's own result of that name.
    if name in KNOWN and not Path(name).exists():
        return str(fetched(name))
    return name


def check_model_place(place: str) -> None:
    """Refuse what is no model with plain weights as far as headers go; a name that is no path here may be a hub id.

    Raises:
        ValueError: a path without config.json, quantized weights, an adapter, or a GGUF file that cannot be read.
    """
    if (file := gguf.gguf_file(place)) is not None:
        gguf.read_header(file)
        return
    if Path(place).is_dir():
        check_plain(place)
    if Path(place).exists() and not (Path(place) / "config.json").is_file():
        raise ValueError(
            f"{place} has no config.json; expected the directory of a Hugging Face model, or a .gguf file"
        )


def _check_tokenizer(place: Path) -> None:
    if place.is_dir() and not any(x for name in TOKENIZER_FILES for x in place.glob(name)):
        raise ValueError(
            f"{place} holds no tokenizer (tokenizer.json or the like); copy those of the original model there"
        )
