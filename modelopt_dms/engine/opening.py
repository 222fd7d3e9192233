# SPDX-License-Identifier: Apache-2.0
"""A session on an exported directory, with the backend that one asks for. Loads no library before it is chosen."""

from pathlib import Path
from typing import Literal

from modelopt_dms.engine.backend import Backend
from modelopt_dms.engine.errors import EngineError
from modelopt_dms.engine.manifest import Manifest
from modelopt_dms.engine.session import Session

BackendName = Literal["auto", "tensorrt", "onnxruntime"]


def open_session(
    directory: str | Path,
    backend: BackendName = "auto",
    *,
    batch: int | None = None,
    pages: int | None = None,
    graph: bool = True,
) -> Session:
    """Load a directory's graphs or engines.

    Args:
        directory: that was exported.
        backend: "auto" is TensorRT if engines were built, else onnxruntime.
        batch: batch slots; None: what the engine was built for, or 1.
        pages: of each layer's KV cache; None: what lists can need at most, as far as memory goes.
        graph: TensorRT decodes by a CUDA graph.

    Raises:
        EngineError: it cannot run here; the message says why.
        ManifestError: files are not what the manifest says.
    """
    for name, value in (("batch", batch), ("pages", pages)):
        if value is not None and value < 1:
            raise EngineError(f"{name}={value} must be 1 or more")
    manifest = Manifest.load(directory)
    if backend == "auto":
        backend = "onnxruntime" if manifest.build is None else "tensorrt"
    runner: Backend
    if backend == "onnxruntime":
        from modelopt_dms.engine.ort import OnnxRuntimeBackend

        runner = OnnxRuntimeBackend(
            directory, manifest, batch=1 if batch is None else batch, pages=pages
        )
    elif backend == "tensorrt":
        from modelopt_dms.engine.tensorrt import TensorRTBackend

        built = (manifest.build or {}).get("batch")
        if None not in (batch, built) and batch != built:
            raise EngineError(
                f"batch={batch} is not what the engine was built for: {built}; build it with --batch {batch}"
            )
        runner = TensorRTBackend(directory, manifest, pages=pages, graph=graph)
    else:
        raise EngineError(f"backend={backend!r} must be 'auto', 'tensorrt' or 'onnxruntime'")
    return Session(manifest, runner)
