# SPDX-License-Identifier: Apache-2.0
"""From a share of evicted tokens to a compression ratio, and back.

Symbols: T tokens of a sequence, W delay window, P protected first tokens, e evicted share of the evictable tokens.

The last W + 1 tokens of a sequence are always live, and so are the first P. The others are its *evictable* tokens:

    E = T - (W + 1) - P        resident = T - e * E        CR = T / resident

So the plain target e = 1 - 1/CR (paper, arXiv 2506.05345) gives less than CR on a sequence of finite length. Solved
for e:

    e(CR) = (1 - 1/CR) * T / E

which makes the *physical* compression ratio after T tokens equal CR. It is at most 1 where W + 1 + P <= T / CR, and
approaches 1 - 1/CR as T grows. A head that evicts the share e compresses less on shorter sequences than T, and more on
longer ones, up to 1 / (1 - e).
"""

from decimal import ROUND_CEILING, ROUND_FLOOR, Context


def evictable_tokens(length: int, window: int, protect_first: int = 0) -> int:
    """Tokens of a sequence whose eviction takes effect within it: E = T - (W + 1) - P, at least 0."""
    return max(0, length - (window + 1) - protect_first)


def physical_cr(evicted_fraction: float, length: int, window: int, protect_first: int = 0) -> float:
    """Context over resident tokens of a head after `length` tokens, of whose evictable ones this share was evicted."""
    return length / (length - evicted_fraction * evictable_tokens(length, window, protect_first))


def target_evicted_fraction(cr: float, length: int, window: int, protect_first: int = 0) -> float:
    """Share of the evictable tokens to evict for a physical compression ratio `cr` after `length` tokens.

    The inverse of `physical_cr`; derivation at the top of this file. Call `check_reachable` first.
    """
    if cr == 1.0:
        return 0.0
    return (1.0 - 1.0 / cr) * length / evictable_tokens(length, window, protect_first)


def is_reachable(cr: float, window: int, length: int, protect_first: int = 0) -> bool:
    """Whether always-resident tokens, W + 1 + P, leave room for a compression ratio at this length."""
    return cr == 1.0 or cr * (window + 1 + protect_first) <= length


def check_reachable(
    target_cr: float,
    window: int,
    length: int,
    protect_first: int = 0,
    field: str = "sequence_length",
    wanted: str = "target_cr",
) -> None:
    """Refuse a compression ratio that always-resident tokens rule out at the length of the samples.

    Args:
        target_cr: wanted compression ratio.
        window: delay window W.
        length: tokens of a sample T.
        protect_first: protected first tokens P.
        field: what the length is called where the user set it.
        wanted: what the ratio is called there.

    Raises:
        ValueError: W + 1 + P is more than T / CR.
    """
    if is_reachable(target_cr, window, length, protect_first):
        return
    always_resident = window + 1 + protect_first
    protected = f" + protect_first={protect_first}" if protect_first else ""
    widest = int(length / target_cr) - 1 - protect_first
    raise ValueError(
        f"{wanted}={target_cr:g} cannot be reached with window={window}{protected} at "
        f"{field}={length}: {always_resident} tokens are always resident, but only "
        f"{length / target_cr:.0f} may be; use {field} >= "
        f"{-int(-always_resident * target_cr // 1)}"
        + (f" or window <= {widest}" if widest >= 1 else "")
    )


def rounded_down(ratio: float) -> str:
    """The upper end of a range as three digits that are still within it."""
    return _digits(ratio, ROUND_FLOOR)


def rounded_up(ratio: float) -> str:
    """The lower end of a range, likewise."""
    return _digits(ratio, ROUND_CEILING)


def _digits(ratio: float, rounding: str) -> str:
    return f"{float(Context(prec=3, rounding=rounding).create_decimal(repr(ratio))):g}"
