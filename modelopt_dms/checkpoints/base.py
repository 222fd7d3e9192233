# SPDX-License-Identifier: Apache-2.0
"""A name, a directory or a GGUF file -> a plain causal LM and its tokenizer."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_dms.checkpoints import gguf
from modelopt_dms.checkpoints.fetch import KNOWN, fetched
from modelopt_dms.checkpoints.formats import check_plain
from modelopt_dms.config.bundled import embedded_model_dir, suggestion

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What the hub takes for a repository: NAME or OWNER/NAME.
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}")
# How long the hub may take to answer whether it has a model.
_HUB_SECONDS = 5.0
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
    check_tokenizer(place)
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        place, trust_remote_code=trust_remote_code
    )
    return tokenizer


def own_tokenizer(model: "PreTrainedModel") -> "PreTrainedTokenizerBase | None":
    """The tokenizer in the directory that a model was loaded from, if there is one and it is the model's."""
    place = Path(getattr(model, "name_or_path", "") or "")
    if not place.name or not place.is_dir() or gguf.gguf_file(place) is not None:
        return None
    try:
        tokenizer = load_tokenizer(place)
    except (ValueError, OSError):
        return None
    rows = model.get_input_embeddings().weight.shape[0]
    return tokenizer if tokenizer.vocab_size <= rows else None


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
        ValueError: no such path and no hub id that can be had, a path without config.json, quantized weights, an
            adapter, or a GGUF file that cannot be read.
    """
    if not place.strip():
        raise ValueError(
            f"MODEL is empty; accepted: a directory, a .gguf file, a hub id, {', '.join([EMBEDDED, *KNOWN])}"
        )
    if (file := gguf.gguf_file(place)) is not None:
        gguf.read_header(file)
        return
    if not Path(place).exists():
        _check_hub_id(place)
    if Path(place).is_dir():
        check_plain(place)
    if Path(place).exists() and not (Path(place) / "config.json").is_file():
        raise ValueError(
            f"{place} has no config.json; expected the directory of a Hugging Face model, or a .gguf file"
        )


def _check_hub_id(name: str, file: str = "config.json", what: str = "MODEL") -> None:
    """Refuse a name that neither is a path here nor can be had from the hub, which is asked once."""
    known = [EMBEDDED, *KNOWN]
    accepted = f"a directory, a .gguf file, a hub id, {', '.join(map(repr, known))}"
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise ValueError(f"{name} does not exist{suggestion(name, known)}; accepted: {accepted}")
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, file), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{name} is no path here, is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it"
            f"{suggestion(name, known)}; accepted: {accepted}"
        )
    if (why := _not_on_hub(name, file)) is not None:
        raise ValueError(
            f"{what} {name!r} is no directory, no .gguf file, no known name ({', '.join(known)}), and {why}"
            f"{suggestion(name, known)}"
        )


def _not_on_hub(name: str, file: str) -> str | None:
    """Why a repository cannot be had from the hub, by one request for a file of it; None if it may be.

    transformers would try for minutes, and then name neither the model nor what else it could be.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, file), timeout=_HUB_SECONDS)
    except (errors.GatedRepoError, errors.EntryNotFoundError):
        return None  # it is there; what is wrong with it, transformers says
    except errors.RepositoryNotFoundError:
        return "the hub has no model of this name that you may read"
    except errors.HfHubHTTPError as error:
        return f"the hub answered with status {error.response.status_code}"
    # Of the HTTP client, which is another one in other versions of huggingface_hub.
    except Exception as error:
        return (
            f"the hub could not be reached ({' '.join(str(error).split()) or type(error).__name__})"
        )
    return None


def check_tokenizer(name: str | Path) -> None:
    """Refuse what no tokenizer can be read from, as far as names tell.

    Raises:
        ValueError: no such path and no hub id that can be had, or a directory without a tokenizer.
    """
    place = Path(name)
    if gguf.gguf_file(place) is not None:
        return
    if not place.exists():
        _check_hub_id(str(name), "tokenizer_config.json", "the tokenizer")
    if place.is_dir() and not any(x for name in TOKENIZER_FILES for x in place.glob(name)):
        raise ValueError(
            f"{place} holds no tokenizer (tokenizer.json or the like); copy those of the original model there"
        )


def computes_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 numbers by instructions: x86 without AVX-512 does not."""
    import torch

    return torch.backends.cpu.get_cpu_capability() != "AVX2"


def slow_dtype(model: "PreTrainedModel") -> str | None:
    """A line for who runs a bfloat16 model on a CPU that computes such numbers in software; None if all is well."""
    if model.device.type != "cpu" or "bfloat16" not in str(model.dtype) or computes_bfloat16():
        return None
    return "this CPU has no instructions for bfloat16, which takes far longer than float32 here: --dtype float32"
