# SPDX-License-Identifier: Apache-2.0
"""A request and what is counted about requests. Knows neither pages nor graphs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from modelopt_dms.engine.errors import EngineError
from modelopt_dms.engine.manifest import Manifest
from modelopt_dms.engine.sampling import Sampler, Sampling

OnToken = Callable[["Request", int], None]


@dataclass(eq=False)
class Request:
    """A prompt and what was generated for it so far.

    Attributes:
        prompt: token ids.
        max_new_tokens: that are generated unless one of them ends the sequence.
        sampling: how they are chosen.
        on_token: is called with this and each token, as soon as it is chosen.
        ignore_eos: no token ends the sequence.
        tokens: generated so far, the one that ends the sequence included.
        finish: why there are no more: a token that ends the sequence, `max_new_tokens`, or an error.
        error: of a request that failed.
        live: mean live slots of a list at its end, of `seen` tokens.
        seen: tokens that were taken into the cache.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    on_token: OnToken | None = None
    ignore_eos: bool = False
    tokens: list[int] = field(default_factory=list)
    finish: Literal["eos", "length", "error"] | None = None
    error: Exception | None = None
    live: float = 0.0
    seen: int = 0

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.sampling)

    def take(self, token: int, eos: tuple[int, ...]) -> None:
        """Append a generated token, and see whether it is the last."""
        self.tokens.append(token)
        if token in eos and not self.ignore_eos:
            self.finish = "eos"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish = "length"

    def tell(self, token: int) -> None:
        """Call who wants to know about a new token."""
        if self.on_token is not None:
            self.on_token(self, token)


@dataclass(eq=False)
class Slot:
    """A request in a batch slot.

    Attributes:
        row: of the batch.
        request: that has it.
        ids: to read: the prompt, and what was generated before the request was put back.
        arrival: counts requests as they got a batch slot.
        chunks_read: of the ids.
        reading: there are more.
    """

    row: int
    request: Request
    ids: tuple[int, ...]
    arrival: int
    chunks_read: int = 0
    reading: bool = True

    def next_chunk(self, size: int) -> tuple[int, int]:
        """Where the next chunk begins and ends; only the first may be shorter than the others."""
        chunks = -(-len(self.ids) // size)
        end = len(self.ids) - (chunks - 1 - self.chunks_read) * size
        return max(end - size, 0), end


@dataclass
class Stats:
    """What a session did.

    Attributes:
        prompt_tokens: read, those of requests that were put back included.
        prefill_seconds: spent on it.
        chunks: prefill runs.
        new_tokens: chosen.
        decode_steps: decode runs.
        decode_tokens: tokens that they gave.
        decode_seconds: spent on them, choosing tokens included.
        put_back: requests that lost their pages to older ones and started over.
        peak_pages: most pages in use, of all layers together.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    chunks: int = 0
    new_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    put_back: int = 0
    peak_pages: int = 0


def check_prompt(ids: Sequence[int], max_new_tokens: int, manifest: Manifest) -> tuple[int, ...]:
    """A prompt that the graphs can take.

    Raises:
        EngineError: not integers, none at all, not of the vocabulary, or too many.
    """
    found: NDArray[np.generic]
    try:
        found = np.asarray(ids)
    except ValueError as error:
        raise EngineError(
            f"prompt_ids must be a list of integers, got lists of several lengths ({error})"
        ) from error
    if found.size == 0:
        raise EngineError("the prompt is empty; an engine needs one token at least")
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise EngineError(
            f"prompt_ids must be a list of integers, got {found.dtype} {list(found.shape)}"
        )
    model = manifest.model
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= model.vocabulary:
        raise EngineError(
            f"prompt_ids must be 0 .. {model.vocabulary - 1}, got {low if low < 0 else high}"
        )
    if max_new_tokens < 1:
        raise EngineError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    if len(found) + max_new_tokens > manifest.max_length:
        raise EngineError(
            f"too long a prompt for the profile: {len(found)} tokens and {max_new_tokens} new ones, and the graphs "
            f"were exported for {manifest.max_length}; shorten it, or export with a larger --max-length"
        )
    return tuple(int(x) for x in found)
