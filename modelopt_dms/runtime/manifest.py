# SPDX-License-Identifier: Apache-2.0
"""What an exported directory says about itself: the model, its graphs, what goes in and out, kernels, engines.

One JSON file, `dms_engine.json`, written by the exporter and added to by the build; everything that runs a graph reads
this file, and nothing else, to know it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from modelopt_dms.config.output_dir import atomic_file

FILE = "dms_engine.json"
FORMAT = 1
PHASES = ("decode", "prefill")


class EngineError(ValueError):
    """An engine that cannot be built, loaded or asked; the message says why, and what to do."""


class ManifestError(ValueError):
    """A directory that is not, or no longer, what its manifest says; the message names the file and the difference."""


@dataclass(frozen=True)
class Port:
    """A tensor that goes into a graph or comes out of it.

    Attributes:
        name: in the graph; a layer's are "keys.0", "live.0", ..., and "new_keys.0", ... where they come out.
        dtype: of torch, without the prefix.
        shape: numbers, or the names "batch" and "pages".
        aliases: the input that this output is, changed in place; None: it is a tensor of its own.
        state: outputs only: the input that this output is the next value of, or None (logits).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    aliases: str | None = None
    state: str | None = None


@dataclass(frozen=True)
class Phase:
    """One graph.

    Attributes:
        graph: file of the ONNX graph.
        inputs: in the graph's order.
        outputs: likewise.
        engine: file of the TensorRT engine, or None before it is built.
        engine_sha256: of that file.
    """

    graph: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    engine: str | None = None
    engine_sha256: str | None = None


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel that a plugin embeds.

    Attributes:
        operator: name in `operators.OPERATORS`.
        file: PTX, in TensorRT's argument order.
        entry: name of its entry.
        sha256: of the file.
        arch: what it was compiled for, such as "sm_90a".
        threads: of a block.
        shared: bytes of dynamic shared memory.
        grid: three expressions of the op's dims (names of `operators`), such as "B * K".
        integers: int32 arguments between inputs and outputs, likewise.
        attributes: of the op, that the kernel was compiled for.
    """

    operator: str
    file: str
    entry: str
    sha256: str
    arch: str
    threads: int
    shared: int
    grid: tuple[str, str, str]
    integers: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """What a runtime must know of the model.

    Attributes:
        architecture: class of transformers.
        layers: with a KV cache.
        kv_heads: K.
        heads: H.
        key_dim: D.
        value_dim: DV.
        vocabulary: V.
        dtype: "float32", "float16" or "bfloat16".
        window: W, tokens a marked token stays readable.
        shift: 1 if a token's decision governs the token before it.
        key_number: "plain", "fp8" or "int8".
        value_number: likewise.
        eos: ids that end a sequence.
    """

    architecture: str
    layers: int
    kv_heads: int
    heads: int
    key_dim: int
    value_dim: int
    vocabulary: int
    dtype: str
    window: int
    shift: int
    key_number: str
    value_number: str
    eos: tuple[int, ...]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of 64 slots, keys and values."""
        size = {"float32": 4, "float16": 2, "bfloat16": 2}[self.dtype]
        keys = self.key_dim * (size if self.key_number == "plain" else 1)
        values = self.value_dim * (size if self.value_number == "plain" else 1)
        return 64 * (keys + values)


@dataclass(frozen=True)
class Manifest:
    """All of it.

    Attributes:
        model: what the graphs compute.
        page: slots of a page.
        pages_per_list: P, pages a list can own.
        chunk: tokens of a prefill chunk.
        programs: programs that share a decode step's tiles.
        phases: "decode" and "prefill".
        kernels: one for every op of the graphs; empty where no plugin is meant.
        plugin_free: the graphs hold standard ops only.
        build: what the engines were built with (tensorrt, cuda, gpu, sm, batch, ...), or None.
        made_by: versions of what wrote the graphs.
        files: sha256 of the graphs and of their weights, by name.
    """

    model: Model
    page: int
    pages_per_list: int
    chunk: int
    programs: int
    phases: dict[str, Phase]
    kernels: tuple[Kernel, ...] = ()
    plugin_free: bool = False
    build: dict[str, Any] | None = None
    made_by: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def max_length(self) -> int:
        """Tokens that every list has room for, whatever is evicted."""
        return self.page * self.pages_per_list

    def all_pages(self, batch: int) -> int:
        """Pages that a layer's lists own together when none can grow any more."""
        return batch * self.model.kv_heads * self.pages_per_list

    def save(self, directory: Path) -> None:
        """Write it, whole or not at all."""
        content = {"format": FORMAT, **asdict(self)}
        with atomic_file(directory / FILE) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(directory: str | Path) -> "Manifest":
        """Read it.

        Raises:
            ManifestError: there is none, or one of another format.
        """
        path = Path(directory) / FILE
        if not path.is_file():
            raise ManifestError(
                f"{directory} holds no {FILE}; expected a directory written by `modelopt-dms export --format onnx` "
                "or `--format tensorrt`"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ManifestError(f"{path} is not JSON ({error}); export again") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ManifestError(f"{path} is of another format than {FORMAT}; export again")
        try:
            found = _manifest(content)
            _check(found)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ManifestError(
                f"{path} lacks or misnames a field ({error}); export again"
            ) from error
        return found

    def with_engines(
        self, engines: dict[str, str], directory: Path, build: dict[str, Any]
    ) -> "Manifest":
        """This, after a build: engine files by phase."""
        phases = {
            name: replace(
                phase, engine=engines[name], engine_sha256=sha256(directory / engines[name])
            )
            for name, phase in self.phases.items()
        }
        return replace(self, phases=phases, build=build)


def sha256(path: Path) -> str:
    """Hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _manifest(content: dict[str, Any]) -> Manifest:
    model = content.pop("model")
    model = Model(**{**model, "eos": tuple(model["eos"])})
    phases = {
        name: Phase(**{**x, "inputs": _ports(x["inputs"]), "outputs": _ports(x["outputs"])})
        for name, x in content.pop("phases").items()
    }
    kernels = tuple(
        Kernel(**{**x, "grid": tuple(x["grid"]), "integers": tuple(x["integers"])})
        for x in content.pop("kernels")
    )
    return Manifest(model, phases=phases, kernels=kernels, **content)


def _ports(items: list[dict[str, Any]]) -> tuple[Port, ...]:
    return tuple(Port(**{**x, "shape": tuple(x["shape"])}) for x in items)


# Not by pydantic: what reads a manifest beside TensorRT may have nothing but Python.
def _check(manifest: Manifest) -> None:
    """Raise ValueError for what no exporter writes."""
    model = manifest.model
    for holder, counts in ((manifest, _COUNTS), (model, _MODEL_COUNTS)):
        for name in counts:
            value = getattr(holder, name)
            if type(value) is not int or not 0 < value < 2**31:
                raise ValueError(f"{name}={value!r:.80} must be a number from 1 to 2**31 - 1")
    for name, accepted in _WORDS.items():
        if (value := getattr(model, name)) not in accepted:
            raise ValueError(f"{name}={value!r:.80} must be one of {', '.join(map(str, accepted))}")
    if not all(type(x) is int for x in model.eos):
        raise ValueError(f"eos={model.eos!r:.80} must be token ids")
    for name in ("made_by", "files"):
        value = getattr(manifest, name)
        if not isinstance(value, dict) or not all(isinstance(x, str) for x in value.values()):
            raise ValueError(f"{name}={value!r:.80} must be a mapping to texts")
    if not isinstance(manifest.build, dict | None) or type(manifest.plugin_free) is not bool:
        raise ValueError("build must be a mapping or null, plugin_free true or false")
    phases = manifest.phases.values()
    names = [x for phase in phases for x in (phase.graph, phase.engine) if x is not None]
    for name in (*names, *manifest.files, *(x.file for x in manifest.kernels)):
        if (
            not isinstance(name, str)
            or {"..", "/", "."} & {*(Path(name).parts or ".")}
            or "\0" in name
        ):
            raise ValueError(f"{name!r:.80} is no name of a file beside it")
    for port in (x for phase in phases for x in (*phase.inputs, *phase.outputs)):
        if not isinstance(port.name, str) or not all(isinstance(x, int | str) for x in port.shape):
            raise ValueError(f"port {port.name!r:.80} has shape {port.shape!r:.80}")
    for kernel in manifest.kernels:
        words = (
            *kernel.grid,
            *kernel.integers,
            kernel.operator,
            kernel.entry,
            kernel.sha256,
            kernel.arch,
        )
        if not all(isinstance(x, str) for x in words):
            raise ValueError(f"kernel {kernel.operator!r:.80}: what is no number must be text")


_COUNTS = ("page", "pages_per_list", "chunk", "programs")
_MODEL_COUNTS = ("layers", "kv_heads", "heads", "key_dim", "value_dim", "vocabulary", "window")
_WORDS: dict[str, tuple[Any, ...]] = {
    "dtype": ("float32", "float16", "bfloat16"),
    "shift": (0, 1),
    "key_number": ("plain", "fp8", "int8"),
    "value_number": ("plain", "fp8", "int8"),
}
