# SPDX-License-Identifier: Apache-2.0
"""How much longer answers get when the cache forgets: eviction that makes a model go on and on costs what it saves."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MUCH = 1.5  # times as long as with the full cache


@dataclass
class AnswerLengths:
    """Tokens of the answers to the same requests, in their order.

    Attributes:
        evicting: with the cache that forgets.
        full: with the full cache.
    """

    evicting: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)

    def add(self, evicting: Sequence[int], full: Sequence[int]) -> None:
        """Count more requests.

        Raises:
            ValueError: not equally many.
        """
        if len(evicting) != len(full):
            raise ValueError(f"{len(evicting)} answers cannot be compared with {len(full)}")
        self.evicting += evicting
        self.full += full

    def row(self) -> dict[str, Any]:
        """Means, and the ratio of lengths by request: mean, 90th percentile, share of those that are MUCH longer."""
        # An answer of no tokens counts as one.
        ratios = sorted(
            max(1, a) / max(1, b) for a, b in zip(self.evicting, self.full, strict=True)
        )
        n = len(ratios)
        return {
            "requests": n,
            "mean_tokens": sum(self.evicting) / n,
            "mean_tokens_full": sum(self.full) / n,
            "ratio_mean": sum(ratios) / n,
            # The smallest ratio that at least nine of ten requests do not exceed.
            "ratio_p90": ratios[-(-9 * n // 10) - 1],
            "share_much_longer": sum(x >= MUCH for x in ratios) / n,
        }

    def line(self) -> str:
        """`row` in words."""
        x = self.row()
        return (
            f"answers of {x['mean_tokens']:.1f} tokens, {x['mean_tokens_full']:.1f} with the full cache; by request "
            f"{x['ratio_mean']:.2f} times as long on average, {x['ratio_p90']:.2f} at the 90th percentile, "
            f"{100 * x['share_much_longer']:.1f} % at least {MUCH:g} times ({x['requests']} requests)"
        )
