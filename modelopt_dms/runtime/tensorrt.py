# SPDX-License-Identifier: Apache-2.0
"""Runs a directory's TensorRT engines: addresses, streams, the decode step as a CUDA graph.

An output that is its input, changed in place, is bound to the address of that input; others are copied over their
input's tensor afterwards. No tensor moves between two decode steps, so that one graph fits them all.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from modelopt_dms.runtime.checks import Found, check_engine, check_pages, check_ports, check_version
from modelopt_dms.runtime.execution import Execution, is_pool
from modelopt_dms.runtime.gpu import Gpu
from modelopt_dms.runtime.manifest import EngineError, Manifest
from modelopt_dms.runtime.state import State, check_feeds, dtype_of, shape_of

MEMORY_SHARE = 0.8  # of what is free goes into pages, if nobody says how many


def import_tensorrt() -> ModuleType:
    """The module.

    Raises:
        EngineError: it is not installed, or not of a version that we know.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(
            f"TensorRT is not installed ({error}); `pip install 'modelopt-dms[tensorrt]'`"
        ) from error
    check_version(tensorrt.__version__)
    return tensorrt


def check_machine(needs: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each of these gives, such as `import_tensorrt` and `Gpu`.

    Raises:
        EngineError: some are missing here; it says of all of them how to install them.
    """
    found, missing = [], []
    for need in needs:
        try:
            found.append(need())
        except EngineError as error:
            missing.append(str(error))
    if missing:
        raise EngineError("; and ".join(missing))
    return found


def make_log(trt: ModuleType) -> Any:
    """A logger that keeps the errors in `errors`: TensorRT's calls return None and say there why."""

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            levels = trt.ILogger.Severity
            if severity in (levels.INTERNAL_ERROR, levels.ERROR):
                self.errors.append(msg.strip())

        def text(self) -> str:
            return "; ".join(self.errors[-3:]) or "it does not say why"

    return Log()


class TensorRTBackend:
    """A directory's engines on a GPU.

    Attributes:
        manifest: of the directory.
        state: of the batch slots that the engines were built for.
    """

    def __init__(
        self,
        directory: str | Path,
        manifest: Manifest | None = None,
        *,
        pages: int | None = None,
        graph: bool = True,
        gpu: Gpu | None = None,
    ) -> None:
        """Load the engines.

        Args:
            directory: that was exported, and built.
            manifest: of it, if it was read already.
            pages: of each layer that can be given out; None: as many as memory holds and the engine takes.
            graph: decode by a CUDA graph.
            gpu: to run on.

        Raises:
            EngineError: TensorRT, the GPU or the engines are missing or do not fit each other.
            ManifestError: files or engines are not what the manifest says.
        """
        directory = Path(directory)
        self.manifest = manifest = manifest or Manifest.load(directory)
        trt, gpu = check_machine([import_tensorrt, lambda: gpu or Gpu()])
        self._gpu = gpu
        check_engine(manifest, directory, trt.__version__, gpu.capability)
        self._log = make_log(trt)
        self._runtime = trt.Runtime(self._log)
        engines = {x: self._load(trt, directory, x) for x in manifest.phases}
        # Before memory is counted, since TensorRT takes its scratch now.
        contexts = {x: self._context(engines[x], x) for x in engines}
        build = manifest.build or {}
        count = self._pages(pages, build)
        free = gpu.free_bytes
        try:
            self.state = State(manifest, build["batch"], count, gpu.device)
            self._runs = self._bind(contexts)
            self._replay = self._capture() if graph else None
        except torch.OutOfMemoryError as error:
            size = (count + 1) * self._slice_bytes() >> 20
            raise EngineError(
                f"pages={count} are too many for the GPU: they take {size} MiB in all layers, and {free >> 20} MiB "
                "were free; ask for fewer with --pages"
            ) from error

    def run(self, phase: str, feeds: dict[str, Tensor], row: int | None = None) -> Tensor:
        """Run an engine; see `session.Backend`."""
        execution = self._runs[phase]
        check_feeds(self.manifest.phases[phase], feeds, execution.state.batch)
        with self._gpu.on_stream() as stream:
            for name, buffer in execution.feeds.items():
                buffer.copy_(feeds[name])
            if row is not None:
                execution.state.copy_small(self.state, slice(row, row + 1), slice(None))
            if phase == "decode" and self._replay is not None:
                self._replay()
            else:
                execution.launch(stream)
            if row is not None:
                self.state.copy_small(execution.state, slice(None), slice(row, row + 1))
        return execution.results["logits"]

    def _load(self, trt: ModuleType, directory: Path, name: str) -> Any:
        """Deserialize an engine, and compare what it takes and gives with the manifest."""
        phase = self.manifest.phases[name]
        path = directory / str(phase.engine)
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineError(f"TensorRT cannot load {path}: {self._log.text()}")
        inputs, outputs = ports_of(trt, engine)
        check_ports(f"{path.name}, inputs", phase.inputs, inputs)
        check_ports(f"{path.name}, outputs", phase.outputs, outputs)
        return engine

    def _context(self, engine: Any, name: str) -> Any:
        context = engine.create_execution_context()
        if context is None:
            raise EngineError(f"TensorRT has no memory for a context of {name}: {self._log.text()}")
        return context

    def _bind(self, contexts: dict[str, Any]) -> dict[str, Execution]:
        """Addresses of both engines; pages that they return are the same memory, since they never run at once."""
        # A batch slot's part of a tensor is not aligned as TensorRT wants it: the row is copied.
        states = {"decode": self.state, "prefill": self.state.staging(1)}
        pools: dict[str, Tensor] = {}
        return {
            x: Execution(contexts[x], self.manifest.phases[x], states[x], self._gpu, pools)
            for x in contexts
        }

    def _slice_bytes(self) -> int:
        """What a page of every layer takes: in the state, and once more where a graph returns pages of its own."""
        phases = self.manifest.phases.values()
        ports = {x.name: x for y in phases for x in y.inputs if is_pool(x.name)}
        ports |= {
            x.name: x for y in phases for x in y.outputs if is_pool(x.state) and x.aliases is None
        }
        return sum(math.prod(shape_of(x, 1, 1)) * dtype_of(x).itemsize for x in ports.values())

    def _pages(self, asked: int | None, build: dict[str, Any]) -> int:
        """Pages of each layer that can be given out."""
        model, most = self.manifest.model, int(build["pages"])
        if asked is not None:
            check_pages(asked, self.manifest)
            if asked <= most:
                return asked
            raise EngineError(
                f"pages={asked} is more than the {most} that the engine was built for; build it with --pages {asked}"
            )
        room = int(MEMORY_SHARE * self._gpu.free_bytes) // self._slice_bytes() - 1
        if room < model.kv_heads:
            raise EngineError(
                f"the GPU has {self._gpu.free_bytes >> 20} MiB free, which hold {max(room, 0)} pages of each of "
                f"{model.layers} layers; one sequence needs {model.kv_heads} at least"
            )
        return min(most, room)

    def _capture(self) -> Callable[[], None]:
        """The decode step as a CUDA graph. No batch slot is active yet: running it changes nothing."""
        execution = self._runs["decode"]
        try:
            # TensorRT allocates in the first run, and that cannot be captured.
            with self._gpu.on_stream() as stream:
                execution.launch(stream)
            return self._gpu.capture(execution.launch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise EngineError(
                f"the decode step cannot be captured as a CUDA graph ({error}); run it without one: "
                "--backend tensorrt-eager"
            ) from error


def ports_of(trt: ModuleType, engine: Any) -> tuple[Found, Found]:
    """What an engine takes, and what it gives."""
    types = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT8: "int8",
        trt.DataType.INT32: "int32",
        trt.DataType.INT64: "int64",
        trt.DataType.BOOL: "bool",
        trt.DataType.UINT8: "uint8",
    }
    found: tuple[Found, Found] = ({}, {})
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        given = engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT
        dtype = engine.get_tensor_dtype(name)
        shape = tuple(engine.get_tensor_shape(name))
        found[given][name] = types.get(dtype, str(dtype)), shape
    return found
