# SPDX-License-Identifier: Apache-2.0
"""The CUDA device that an engine runs on: what it is, a stream, and graphs of work on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from modelopt_dms.runtime.manifest import EngineError


class Gpu:
    """A CUDA device and a stream of it.

    Attributes:
        device: of torch.
        name: of its maker.
        capability: compute capability, such as "9.0".
    """

    def __init__(self, index: int = 0) -> None:
        """Take it.

        Raises:
            EngineError: there is none, or torch cannot use it.
        """
        if torch.version.cuda is None:
            raise EngineError(
                f"torch {torch.__version__} is built without CUDA; `pip install torch` from the index of your CUDA "
                "(pytorch.org); --backend onnxruntime runs the graphs on the CPU"
            )
        if not torch.cuda.is_available():
            raise EngineError(
                "no CUDA GPU is visible to torch: a TensorRT engine needs one, and NVIDIA's driver, 580 or newer for "
                "CUDA 13 (`nvidia-smi` shows both); --backend onnxruntime runs the graphs on the CPU"
            )
        self.device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(self.device)
        major, minor = torch.cuda.get_device_capability(self.device)
        self.capability = f"{major}.{minor}"
        self._stream = torch.cuda.Stream(self.device)

    @property
    def free_bytes(self) -> int:
        """Memory that nobody uses."""
        return torch.cuda.mem_get_info(self.device)[0]

    @contextmanager
    def on_stream(self) -> Iterator[int]:
        """Put work on our stream, between what was queued before and what comes after; gives the stream's handle."""
        outside = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield self._stream.cuda_stream
        outside.wait_stream(self._stream)

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        """Record what `work` puts on the stream whose handle it is given; the result repeats it."""
        graph = torch.cuda.CUDAGraph()
        self._stream.synchronize()
        with torch.cuda.graph(graph, stream=self._stream):
            work(self._stream.cuda_stream)
        return graph.replay
