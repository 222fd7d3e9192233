# SPDX-License-Identifier: Apache-2.0
"""What every cache of a layer does, however it stores rows; and the checks that they share."""

from typing import Protocol

from torch import Tensor

from modelopt_dms.kvcache.usage import Usage


class LayerUsage(Protocol):
    """What a layer's cache holds; it can be read after the cache has gone on.

    Attributes:
        row_values: numbers in one key and value row.
    """

    row_values: int

    def synchronized(self) -> Usage:
        """The numbers; waits for the device."""


class LayerCache(Protocol):
    """The KV rows of one layer: for every (sequence, KV head) a list of slots, of which `live` are in use.

    A token is kept until its eviction was decided and it is more than `window` positions old. Then a later token takes
    its slot, so that lists have no holes. After the same calls, all implementations hold the same rows in the same
    slots: `tests/kvcache/test_conformance.py`.

    Shapes: B sequences, K KV heads, T new tokens, L slots in use. List b * K + k is that of sequence b and head k.

    Attributes:
        window: tokens a marked token stays readable.
        shift: 1 if a token's logit governs the token before it, else 0.
        seen: positions, padding included.
        rollback: tokens that `crop` must be able to take back.
    """

    window: int
    shift: int
    seen: int
    rollback: int

    @property
    def B(self) -> int:
        """Sequences."""

    @property
    def K(self) -> int:
        """KV heads."""

    @property
    def lists(self) -> int:
        """Number of lists, B * K."""

    @property
    def live(self) -> Tensor:
        """Slots in use [B, K]."""

    @property
    def usage(self) -> LayerUsage:
        """Tokens and bytes held."""

    def append(self, k: Tensor, v: Tensor, decisions: Tensor, valid: Tensor | None) -> None:
        """Take in T tokens and drop what is marked and has left the window.

        Args:
            k: key rows [B, K, T, Dk].
            v: value rows [B, K, T, Dv].
            decisions: eviction decisions [B, K, T] bool, as made by these tokens' hidden states.
            valid: False [B, T] for padding, which is never kept; None if there is none.
        """

    def decide_previous(self, decisions: Tensor) -> None:
        """With shift 1: the first new token's decision [B, K] governs the last token held."""

    def rows(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys [L, .] and values [L, .] of one list in slot order, as they are stored."""

    def pending(self, index: int) -> tuple[Tensor, Tensor]:
        """Positions [N] and slots [N] of one list's tokens that are marked and not yet evicted."""

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens` tokens, bringing back the rows they overwrote.

        What was appended without padding can be taken back up to `rollback` tokens, a draft of up to
        `kernels.rollback.LONGEST_DRAFT` as a whole until the next append; nothing if `rollback` was 0.

        Raises:
            ValueError: more tokens than can be taken back; nothing has changed.
        """

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences [B'], in this order; one may be named several times (beams). Nothing can be cropped."""

    def emptied(self) -> "LayerCache":
        """An empty cache like this one, which must not be used any longer; `usage` stays readable."""

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot is shared, out of range, or without memory."""


def check_recoverable(cache: LayerCache, tokens: int, recoverable: int) -> None:
    """Raise ValueError if more tokens are to be taken back than a cache can."""
    if tokens > recoverable:
        raise ValueError(
            f"cannot take back {tokens} tokens: the evicted rows of only the last {recoverable} are still held "
            f"(delay window {cache.window}, limit {cache.rollback}); call activate_past_recording() on the cache after "
            "its first forward to hold as many as the delay window"
        )


def check_slots(live: Tensor, ring_slot: Tensor, positions: Tensor) -> None:
    """Raise AssertionError if lists of lengths [B, K] lack tokens of their rings [B, K, R], or mix them up."""
    for slots, held, length in zip(
        ring_slot.flatten(0, 1),
        (positions >= 0).flatten(0, 1),
        live.flatten().tolist(),
        strict=True,
    ):
        used = slots[held & (slots >= 0)]
        assert len(used.unique()) == len(used), "two tokens share a slot"
        assert bool((used < length).all()), "a pending token lies beyond its list"
