# SPDX-License-Identifier: Apache-2.0
"""Runs exported graphs in onnxruntime on the CPU: the reference of the TensorRT engines, and a way to try them out.

Functional: graphs return their new state, and it is copied over the old one.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelopt_dms.runtime.checks import Found, check_files, check_pages, check_ports
from modelopt_dms.runtime.manifest import EngineError, Manifest, ManifestError
from modelopt_dms.runtime.state import State, check_feeds

if TYPE_CHECKING:
    import onnxruntime

TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
    "tensor(bfloat16)": "bfloat16",
}


class OnnxRuntimeBackend:
    """A directory's graphs on the CPU.

    Attributes:
        manifest: of the directory.
        state: of the batch slots.
    """

    def __init__(
        self,
        directory: str | Path,
        manifest: Manifest | None = None,
        *,
        batch: int = 1,
        pages: int | None = None,
    ) -> None:
        """Load the graphs.

        Args:
            directory: that was exported.
            manifest: of it, if it was read already.
            batch: batch slots.
            pages: of each layer that can be given out; None: as many as the lists can ever need.

        Raises:
            EngineError: onnxruntime is missing or cannot run graphs of this dtype, or one sequence needs more pages.
            ManifestError: the graphs are not those of the manifest.
        """
        directory = Path(directory)
        self.manifest = manifest = manifest or Manifest.load(directory)
        if batch < 1:
            raise EngineError(f"batch={batch} must be 1 or more")
        if manifest.model.dtype == "bfloat16":
            raise EngineError(
                "wrong dtype: onnxruntime's CPU kernels have no bfloat16; export the model with --dtype float32 to "
                "run it there"
            )
        pages = manifest.all_pages(batch) if pages is None else pages
        check_pages(pages, manifest)
        check_files(manifest, directory)
        self._sessions = {name: _open(directory, manifest, name) for name in manifest.phases}
        self.state = State(manifest, batch, pages)

    def run(self, phase: str, feeds: dict[str, Tensor], row: int | None = None) -> Tensor:
        """Run a graph; see `session.Backend`."""
        described = self.manifest.phases[phase]
        rows = slice(None) if row is None else slice(row, row + 1)
        check_feeds(described, feeds, self.state.batch if row is None else 1)
        inputs = {
            x.name: (self.state.tensor(x.name, rows) if self.state.has(x.name) else feeds[x.name])
            for x in described.inputs
        }
        arrays = {name: x.contiguous().numpy() for name, x in inputs.items()}
        names = [x.name for x in described.outputs]
        outputs = dict(zip(names, self._sessions[phase].run(names, arrays), strict=True))
        for port in described.outputs:
            if port.state is not None:
                new = torch.from_numpy(outputs[port.name])
                self.state.tensor(port.state, rows).copy_(new)
        return torch.from_numpy(outputs["logits"])


def _open(directory: Path, manifest: Manifest, name: str) -> "onnxruntime.InferenceSession":
    """A graph's session, its inputs and outputs compared with the manifest."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            "onnxruntime is not installed; `pip install 'modelopt-dms[onnx]'`"
        ) from error
    phase = manifest.phases[name]
    path = directory / phase.graph
    if not path.is_file():
        raise ManifestError(f"{path} is missing; export again")
    options = onnxruntime.SessionOptions()
    # Constants of an exported graph are folded with a warning each; errors still come.
    options.log_severity_level = 3
    # onnxruntime fuses DequantizeLinear and MatMul also where weights are FP8, and then refuses what it made.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own classes are not public
        raise ManifestError(f"onnxruntime cannot load {path}: {error}") from error
    check_ports(f"{phase.graph}, inputs", phase.inputs, _found(session.get_inputs()))
    check_ports(f"{phase.graph}, outputs", phase.outputs, _found(session.get_outputs()))
    return session


def _found(nodes: list[Any]) -> Found:
    """Inputs or outputs of a session; dims with names may vary."""
    return {
        x.name: (TYPES.get(x.type, x.type), tuple(d if isinstance(d, int) else -1 for d in x.shape))
        for x in nodes
    }
