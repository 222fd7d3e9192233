# SPDX-License-Identifier: Apache-2.0
"""One TensorRT engine with the addresses of all it takes and gives."""

from typing import Any

import torch
from torch import Tensor

from modelopt_dms.runtime.gpu import Gpu
from modelopt_dms.runtime.manifest import EngineError, Phase
from modelopt_dms.runtime.state import POOLS, State, dtype_of, shape_of


class Execution:
    """One engine's context, its addresses bound.

    Attributes:
        state: that it reads and changes.
        feeds: buffers of its other inputs.
        results: outputs that are tensors of their own.
    """

    def __init__(
        self, context: Any, phase: Phase, state: State, gpu: Gpu, pools: dict[str, Tensor]
    ) -> None:
        """Bind them; `pools` are the pages that engines return, by name, and grows."""
        self.state = state
        self._phase = phase
        self._context = context
        self.feeds: dict[str, Tensor] = {}
        self.results: dict[str, Tensor] = {}
        self._moves: list[tuple[Tensor, Tensor]] = []
        for port in phase.inputs:
            if state.has(port.name):
                tensor = state.tensor(port.name)
            else:
                shape = shape_of(port, state.batch, state.pages + 1)
                tensor = torch.zeros(shape, dtype=dtype_of(port), device=gpu.device)
                self.feeds[port.name] = tensor
            self._must(self._context.set_input_shape(port.name, tuple(tensor.shape)), port.name)
            self._bind(port.name, tensor)
        for port in phase.outputs:
            if port.aliases is not None:
                self._bind(port.name, state.tensor(port.aliases))
                continue
            if port.name in pools:
                tensor = pools[port.name]
            else:
                shape = shape_of(port, state.batch, state.pages + 1)
                tensor = torch.zeros(shape, dtype=dtype_of(port), device=gpu.device)
            if is_pool(port.state):
                pools[port.name] = tensor
            self.results[port.name] = tensor
            self._bind(port.name, tensor)
            if port.state is not None:
                self._moves.append((state.tensor(port.state), tensor))

    def launch(self, stream: int) -> None:
        """Put a run, and the copies of what is not changed in place, on the current stream, whose handle this is."""
        self._must(self._context.execute_async_v3(stream), "execute_async_v3")
        for old, new in self._moves:
            old.copy_(new)

    def _bind(self, name: str, tensor: Tensor) -> None:
        self._must(self._context.set_tensor_address(name, tensor.data_ptr()), name)

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise EngineError(f"TensorRT refuses {what} of {self._phase.engine}")


def is_pool(name: str | None) -> bool:
    """Whether a state tensor holds pages."""
    return name is not None and name.partition(".")[0] in POOLS
