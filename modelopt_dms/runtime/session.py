# SPDX-License-Identifier: Apache-2.0
"""A static batch on an exported directory: reads prompts by chunks, then decodes until every row has ended.

Proves that a directory generates what PyTorch does, and times it; it is no server: no prompt joins a running batch.
Independent of what runs the graphs; loads no library before a backend is chosen.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from modelopt_dms.runtime.manifest import EngineError, Manifest
from modelopt_dms.runtime.prompts import allocate_pages, check_prompts
from modelopt_dms.runtime.sampling import Sampler
from modelopt_dms.runtime.state import State

BackendName = Literal["auto", "tensorrt", "tensorrt-eager", "onnxruntime"]
OnToken = Callable[[int, int], None]


class Backend(Protocol):
    """Runs the graphs of a directory on state of its own.

    Attributes:
        state: of its batch slots; the session reads and writes it between runs.
    """

    state: State

    def run(self, phase: str, feeds: dict[str, Tensor], row: int | None = None) -> Tensor:
        """Run a graph and make its new state the state.

        Args:
            phase: "decode" or "prefill".
            feeds: the inputs that are no state, on the CPU.
            row: of the batch slot that is prefilled; None where all take part.

        Returns:
            Logits [B, V] or [1, V], which the next run may overwrite.
        """
        ...


@dataclass
class Stats:
    """What a batch did.

    Attributes:
        prompt_tokens: read.
        prefill_seconds: spent on it.
        decode_steps: decode runs.
        decode_tokens: tokens that they gave.
        decode_seconds: spent on them, choosing tokens included.
        seen: tokens of each row that the cache took in.
        live: mean live slots of each row's lists at the end.
        pages: that live slots fill at the end, of all layers together.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    seen: tuple[int, ...] = ()
    live: tuple[float, ...] = ()
    pages: int = 0


class Session:
    """Generates for as many prompts at a time as there are batch slots.

    Attributes:
        manifest: of the graphs.
        backend: that runs them.
        stats: of the last batch.
    """

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self.manifest = manifest
        self.backend = backend
        self.stats = Stats()

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Tensor,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: OnToken | None = None,
    ) -> list[list[int]]:
        """New tokens for each prompt, the one that ends its text included.

        Args:
            prompts: token ids, one sequence for each of the first batch slots.
            max_new_tokens: to generate for each at most.
            temperature: 0 is greedy.
            top_p: draw from the fewest most probable tokens that have at least this probability together.
            seed: of the draws; a prompt draws the same tokens whatever else is in the batch.
            on_token: is called with the row of a prompt and its next token, as soon as it is chosen.

        Raises:
            EngineError: prompts that the graphs cannot take, or a temperature or top_p that makes no sense.
            OutOfPagesError: there are too few pages for all prompts with their new tokens; nothing ran.
        """
        if isinstance(prompts, Tensor):
            prompts = prompts.tolist()
        state, eos = self.backend.state, self.manifest.model.eos
        ids = check_prompts(prompts, max_new_tokens, state.batch, self.manifest)
        sampler = Sampler(temperature, top_p, seed, len(ids))
        # The last new token is not taken in.
        lengths = [len(x) + max_new_tokens - 1 for x in ids]
        state.start(allocate_pages(lengths, state.batch, state.pages, self.manifest))
        self.stats = Stats()
        written: list[list[int]] = [[] for _ in ids]

        def take(rows: list[int], tokens: list[int]) -> list[int]:
            """Append tokens; the rows that go on."""
            for row, token in zip(rows, tokens, strict=True):
                written[row].append(token)
                if on_token is not None:
                    on_token(row, token)
            return [
                x for x in rows if written[x][-1] not in eos and len(written[x]) < max_new_tokens
            ]

        active = []
        for row, prompt in enumerate(ids):
            active += take([row], sampler.choose(self._read(row, prompt), [row]))
        while active:
            last = {x: (written[x][-1], len(ids[x]) + len(written[x]) - 1) for x in active}
            active = take(active, self._decode(last, sampler))
        self._measure([len(x) + len(y) - 1 for x, y in zip(ids, written, strict=True)])
        return written

    def _read(self, row: int, ids: list[int]) -> Tensor:
        """Logits [1, V] after a prompt; its first chunk is padded on the left."""
        T = self.manifest.chunk
        began = time.perf_counter()
        for start in range(-(-len(ids) % T), len(ids), T):
            padding = max(-start, 0)
            part = slice(start + padding, start + T)
            feeds = {
                "input_ids": torch.tensor([[0] * padding + ids[part]]),
                "positions": torch.tensor([[0] * padding + list(range(len(ids)))[part]]),
                "padding": torch.tensor([padding], dtype=torch.int32),
            }
            logits = self.backend.run("prefill", feeds, row)
        self.stats.prompt_tokens += len(ids)
        self.stats.prefill_seconds += time.perf_counter() - began
        return logits

    def _decode(self, last: dict[int, tuple[int, int]], sampler: Sampler) -> list[int]:
        """The next tokens of these rows, whose last token and its position are given; the others rest."""
        began = time.perf_counter()
        batch, rows = self.backend.state.batch, list(last)
        ids, positions = (torch.zeros(batch, 1, dtype=torch.int64) for _ in range(2))
        active = torch.zeros(batch, dtype=torch.bool)
        ids[rows, 0], positions[rows, 0] = torch.tensor(list(last.values())).T
        active[rows] = True
        feeds = {"input_ids": ids, "positions": positions, "active": active}
        tokens = sampler.choose(self.backend.run("decode", feeds)[rows], rows)
        self.stats.decode_steps += 1
        self.stats.decode_tokens += len(tokens)
        self.stats.decode_seconds += time.perf_counter() - began
        return tokens

    def _measure(self, seen: list[int]) -> None:
        """Note what the cache holds of these rows."""
        live = self.backend.state.read_live()[:, : len(seen)]  # [L, n, K]
        self.stats.seen = tuple(seen)
        self.stats.live = tuple(live.mean((0, 2)).tolist())
        self.stats.pages = int((-(-live // self.manifest.page)).sum())


def open_session(
    directory: str | Path,
    backend: BackendName = "auto",
    *,
    batch: int | None = None,
    pages: int | None = None,
) -> Session:
    """Load a directory's graphs or engines.

    Args:
        directory: that was exported.
        backend: "auto" is TensorRT if engines were built, else onnxruntime; "tensorrt-eager" decodes without a CUDA
            graph.
        batch: batch slots; None: what the engine was built for, or 1.
        pages: of each layer's KV cache; None: what lists can need at most, as far as memory goes.

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
        from modelopt_dms.runtime.ort import OnnxRuntimeBackend

        runner = OnnxRuntimeBackend(directory, manifest, batch=batch or 1, pages=pages)
    elif backend in ("tensorrt", "tensorrt-eager"):
        from modelopt_dms.runtime.tensorrt import TensorRTBackend

        built = (manifest.build or {}).get("batch")
        if None not in (batch, built) and batch != built:
            raise EngineError(
                f"batch={batch} is not what the engine was built for: {built}; build it with --batch {batch}"
            )
        graph = backend == "tensorrt"
        runner = TensorRTBackend(directory, manifest, pages=pages, graph=graph)
    else:
        raise EngineError(
            f"backend={backend!r} must be 'auto', 'tensorrt', 'tensorrt-eager' or 'onnxruntime'"
        )
    return Session(manifest, runner)
