# SPDX-License-Identifier: Apache-2.0
"""An exported directory driven by plain numpy and onnxruntime: nothing of our runtime, so that it can judge it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from modelopt_dms.runtime.manifest import Manifest, Port


class Graphs:
    """Sessions of both phases, and a state in which every list owns all the pages that it can."""

    def __init__(self, directory: Path, batch: int) -> None:
        self.manifest = Manifest.load(directory)
        options = onnxruntime.SessionOptions()
        # onnxruntime fuses DequantizeLinear and MatMul also where the weights are FP8, and then fails.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.sessions = {
            name: onnxruntime.InferenceSession(directory / phase.graph, options)
            for name, phase in self.manifest.phases.items()
        }
        self.batch = batch
        model = self.manifest.model
        lists = (model.layers, batch, model.kv_heads, self.manifest.pages_per_list)
        self.pages = 1 + int(np.prod(lists))
        ids = np.arange(1, self.pages, dtype=np.int32).reshape(lists)
        self.state = {x.name: self._start(x, ids) for x in self.ports("decode") if "." in x.name}

    def ports(self, phase: str) -> tuple[Port, ...]:
        return self.manifest.phases[phase].inputs

    def _start(self, port: Port, ids: Any) -> Any:
        name, layer = port.name.split(".")
        if name == "table":
            return ids[int(layer)].copy()
        sizes = {"batch": self.batch, "pages": self.pages}
        shape = [sizes[x] if isinstance(x, str) else x for x in port.shape]
        return np.full(shape, -1 if name == "ring_slot" else 0, dtype=np.dtype(port.dtype))

    def run(self, phase: str, rows: slice = slice(None), **feeds: Any) -> Any:
        """Logits [B, V]; the state of these rows of the batch goes on."""
        given = {
            name: x if name.startswith(("keys", "values")) else x[rows]
            for name, x in self.state.items()
        }
        found = self.sessions[phase].run(None, {**feeds, **given})
        for port, x in zip(self.manifest.phases[phase].outputs, found, strict=True):
            if port.state is None:
                continue
            if port.state.startswith(("keys", "values")):
                self.state[port.state] = x
            else:
                self.state[port.state][rows] = x
        return found[0]

    def read(self, row: int, ids: Any) -> Any:
        """Logits [V] after a prompt [T] of one sequence, in chunks, the first padded on the left."""
        T = self.manifest.chunk
        padding = -len(ids) % T
        ids = np.concatenate([np.zeros(padding, np.int64), ids])
        positions = np.maximum(np.arange(len(ids)) - padding, 0)
        for start in range(0, len(ids), T):
            part = slice(start, start + T)
            logits = self.run(
                "prefill",
                slice(row, row + 1),
                input_ids=ids[None, part],
                positions=positions[None, part],
                padding=np.array([padding if start == 0 else 0], np.int32),
            )
        return logits[0]
