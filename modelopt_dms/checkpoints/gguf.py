# SPDX-License-Identifier: Apache-2.0
"""A .gguf file -> a plain causal LM and its tokenizer, read by transformers with all weights dequantized.

What can be wrong with a file is found in its header, before torch is imported.
"""

import json
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# GGUF does not say what its weights were before they were quantized; nearly all were trained in this one.
AUTO_DTYPE = "bfloat16"
# Of value types with a fixed size, by their number in the file.
_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


class GgufError(ValueError):
    """A GGUF file that cannot be read as a causal LM; the message says why."""


@dataclass(frozen=True)
class Header:
    """What the beginning of a GGUF file says.

    Attributes:
        architecture: llama.cpp's name of it.
        metadata: numbers and strings by key; of arrays, their length.
        tensors: names of the tensors.
        size: bytes that the file has if nothing is missing.
    """

    architecture: str
    metadata: dict[str, Any]
    tensors: frozenset[str]
    size: int


def gguf_file(place: str | Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a directory without config.json; else None.

    Raises:
        GgufError: the directory holds several.
    """
    path = Path(place)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(x for x in path.iterdir() if x.suffix.lower() == ".gguf")
    if len(found) > 1:
        names = ", ".join(x.name for x in found)
        raise GgufError(f"{path} holds {len(found)} GGUF files ({names}); name one of them")
    return found[0] if found else None


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file: whole, one part, a language model, positions as transformers has them.

    Raises:
        GgufError: it is not.
    """
    if not path.is_file():
        raise GgufError(f"{path} does not exist")
    if path.stat().st_size < 24:
        raise GgufError(f"{path} is not a GGUF file: it has {path.stat().st_size} bytes")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise GgufError(f"{path} is not a GGUF file: it begins with {bytes(data[:4])!r}")
        try:
            header = _Reader(data).header()
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
            raise GgufError(f"{path} is damaged: its header cannot be read ({error!r})") from error
        if header.size > len(data):
            raise GgufError(
                f"{path} is not whole: it has {len(data):,} bytes of {header.size:,}; download it again"
            )
    parts = header.metadata.get("split.count", 1)
    if parts > 1:
        raise GgufError(
            f"{path} is one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART WHOLE"
        )
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    factors = sorted(x for x in header.tensors if x.startswith("rope_"))
    # gpt-oss is the only architecture for which transformers reads scaled positions from GGUF; elsewhere it drops them.
    if (scaling != "none" or factors) and header.architecture != "gpt-oss":
        raise GgufError(
            f"{path} scales its rotary positions ({', '.join([f'type {scaling}', *factors])}), which transformers does "
            "not read from GGUF: the model would be another one; use its Hugging Face checkpoint"
        )
    return header


def load_model(
    path: Path,
    *,
    dtype: "torch.dtype | str" = "auto",
    device_map: str | dict[str, Any] | None = None,
) -> "PreTrainedModel":
    """A plain causal LM in the dtype asked for; nothing of it says that it was a GGUF file.

    Args:
        path: the file.
        dtype: of the dequantized weights; "auto" is bfloat16.
        device_map: as in `from_pretrained`.

    Raises:
        GgufError: damaged, or nothing that transformers reads as a causal LM.
    """
    header = read_header(path)
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with _reading(path, header):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise GgufError(f"{path} is a {header.architecture} model, which is not a causal LM")
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            config=config,
            gguf_file=path.name,
            dtype=AUTO_DTYPE if dtype == "auto" else dtype,
            device_map=device_map,
            # Else architectures that transformers can run from packed blocks stay packed, and cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise GgufError(
            f"{path} lacks the weights {', '.join(missing[:4])} ({len(missing)} in all)"
        )
    _check_biases(path, header, model)
    # transformers leaves it empty, and what exports a model reads it.
    model.config.architectures = [type(model).__name__]
    # The reader's spelling of general.name, which is nothing that a config has.
    vars(model.config).pop("_model_name_or_path", None)
    _put_end_tokens(model, header)
    return model.eval()


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a GGUF file, with its chat template.

    Raises:
        GgufError: damaged, or a kind of tokenizer that transformers does not read.
    """
    header = read_header(path)
    if "tokenizer.ggml.tokens" not in header.metadata:
        raise GgufError(f"{path} holds no tokenizer")
    from transformers import AutoTokenizer

    with _reading(path, header):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name
        )
        _drop_added(tokenizer, header.metadata["tokenizer.ggml.tokens"])
    return tokenizer


@contextmanager
def _reading(path: Path, header: Header) -> Iterator[None]:
    """Errors of transformers' reader in one line, and its bar only where bars of weights are shown."""
    from transformers import __version__, modeling_gguf_pytorch_utils
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.utils.logging import is_progress_bar_enabled

    known = {*modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES, *GGUF_ARCHS}
    # llama.cpp's spelling of three of them, which the reader translates.
    known |= {"qwen2moe", "qwen3moe", "gpt-oss", "minimax-m2"}
    if header.architecture not in known:
        raise GgufError(
            f"{path}: transformers {__version__} does not read the GGUF architecture {header.architecture!r}; it reads "
            f"{', '.join(sorted(known - {'tokenizer', 'general'}))}"
        )
    bar = partial(modeling_gguf_pytorch_utils.tqdm, disable=not is_progress_bar_enabled())
    try:
        with mock.patch.object(modeling_gguf_pytorch_utils, "tqdm", bar):
            yield
    except GgufError:
        raise
    except ImportError as error:
        raise GgufError(f"{path} needs the package gguf: pip install gguf") from error
    except Exception as error:  # tokenizers raises nothing narrower
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise GgufError(f"{path} cannot be read by transformers {__version__}: {reason}") from error


def _check_biases(path: Path, header: Header, model: "PreTrainedModel") -> None:
    """Refuse a file whose biases transformers' reader dropped, because its architecture has none there."""
    biases = {x for x in header.tensors if x.startswith("blk.") and x.endswith(".bias")}
    if biases and not any(name.endswith("bias") for name, _ in model.named_parameters()):
        raise GgufError(
            f"{path} has biases ({min(biases)}, {len(biases)} in all) that transformers' {type(model).__name__} does "
            "not have; use its Hugging Face checkpoint"
        )


def _drop_added(tokenizer: Any, count: int) -> None:
    """Take away tokens that are not the file's: the reader adds GPT-2's <|endoftext|>, which has no embedding here."""
    if len(tokenizer) <= count:
        return
    from tokenizers import Tokenizer

    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    fields["added_tokens"] = [x for x in fields["added_tokens"] if x["id"] < count]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(fields))


def _put_end_tokens(model: "PreTrainedModel", header: Header) -> None:
    """End a text where llama.cpp does: also at the end of a turn and of a message, if the file names these tokens."""
    kinds = ("eos", "eot", "eom")
    found = [header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in kinds]
    ends = list(dict.fromkeys(x for x in found if x is not None))
    if ends:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


class _Reader:
    """Walks through the header; a value that is not there is a struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 4

    def header(self) -> Header:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        version = self.number("I")
        if version not in (2, 3):
            raise KeyError(f"version {version}")
        tensor_count, count = self.number("Q"), self.number("Q")
        metadata = {}
        for _ in range(count):
            key = self.string()
            metadata[key] = self.value(self.number("I"))
        names, end = set(), 0
        for _ in range(tensor_count):
            names.add(self.string())
            shape = [self.number("Q") for _ in range(self.number("I"))]
            kind, offset = self.number("I"), self.number("Q")
            if kind not in set(GGMLQuantizationType):
                raise KeyError(f"weights of the unknown number format {kind}")
            elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            end = max(end, offset + prod(shape) // elements * size)
        alignment = metadata.get("general.alignment", 32)
        start = -(-self.position // alignment) * alignment
        return Header(metadata["general.architecture"], metadata, frozenset(names), start + end)

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.position)
        self.position += struct.calcsize(f"<{kind}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        found = self.data[self.position : self.position + length]
        if len(found) != length:
            raise struct.error("it ends within a text")
        self.position += length
        return found.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_FORMATS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in _FORMATS:
            self.position += count * struct.calcsize(f"<{_FORMATS[kind]}")
            return count
        if count > len(self.data):
            raise struct.error(f"an array of {count} values")
        for _ in range(count):
            if kind == _STRING:
                length = self.number("Q")
                self.position += length
            else:
                self.value(kind)
        return count
