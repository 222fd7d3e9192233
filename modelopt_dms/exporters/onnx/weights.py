# SPDX-License-Identifier: Apache-2.0
"""One file of weights for several graphs, each weight in it once."""

import hashlib
from pathlib import Path

import onnx_ir as ir

FILE = "weights.bin"
SMALL = 1024  # bytes; what is smaller stays in the graph
ALIGNMENT = 4096  # of ONNX's external data, for memory mapping


class WeightsFile:
    """The file while graphs move their weights into it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / FILE
        self._path.touch()
        self._places: dict[tuple[str, bytes], int] = {}

    def take(self, model: ir.Model) -> None:
        """Move a graph's weights to the file, or to where the same ones lie already."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < SMALL:
                continue
            value.const_value = ir.ExternalTensor(
                FILE,
                self._place(tensor.tobytes()),
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name or "",
                base_dir=self.directory,
            )

    def _place(self, content: bytes) -> int:
        key = (str(len(content)), hashlib.sha256(content).digest())
        if key not in self._places:
            with self._path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                self._places[key] = file.tell()
                file.write(content)
        return self._places[key]
