# SPDX-License-Identifier: Apache-2.0
"""How long a piece of work takes: CUDA events around replays of a CUDA graph, or a host clock on a CPU. Medians."""

import statistics
import time
from collections.abc import Callable

import torch

WARMUP = {"cuda": 3, "cpu": 1}
REPLAYS = {"cuda": 25, "cpu": 3}
COPY_BYTES = {"cuda": 4 << 30, "cpu": 16 << 20}

Work = Callable[[], object]


def passes(device: torch.device) -> int:
    """How often `graphed` runs its work: what changes its inputs must leave room for so many runs."""
    return WARMUP[device.type] + REPLAYS[device.type]


def graphed(work: Work, device: torch.device) -> float:
    """Microseconds of one run of work that asks the host nothing: replays of a CUDA graph on a GPU.

    Args:
        work: many launches at best, over inputs that together outgrow the cache of the chip.
        device: where it runs.
    """
    if device.type == "cpu":
        return single(work, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP["cuda"]):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return _median(graph.replay, device, 0)


def single(work: Work, device: torch.device, before: Work = lambda: None) -> float:
    """Microseconds of one run of work that is long enough for the gaps between launches not to count.

    Args:
        work: what is timed.
        device: where it runs.
        before: done before each run, outside the time.
    """
    return _median(work, device, WARMUP[device.type], before)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy of random bytes on the device."""
    size = COPY_BYTES[device.type]
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (1e-6 * graphed(lambda: target.copy_(source), device))


def _median(work: Work, device: torch.device, warmup: int, before: Work = lambda: None) -> float:
    clock = _event_time if device.type == "cuda" else _host_time
    times = []
    for turn in range(warmup + REPLAYS[device.type]):
        before()
        taken = clock(work)
        if turn >= warmup:
            times.append(taken)
    return statistics.median(times)


def _event_time(work: Work) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1000 * begin.elapsed_time(end)


def _host_time(work: Work) -> float:
    begin = time.perf_counter()
    work()
    return 1e6 * (time.perf_counter() - begin)
