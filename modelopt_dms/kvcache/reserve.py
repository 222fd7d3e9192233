# SPDX-License-Identifier: Apache-2.0
"""How many pages to reserve for lists whose length at the end is known. Numbers only.

Symbols as in `config.compression_ratio`: T tokens at the end, W delay window, P protected first tokens, e share of the
evictable tokens that is evicted (1 - 1/CR for a ratio CR).
"""

import math

from modelopt_dms.kernels.row_bytes import PAGE

# Texts are not alike: so many times the tokens that are expected to be kept.
MARGIN = 1.15


def pages_per_list(
    length: int, evicted_share: float, window: int, protect_first: int = 0, page: int = PAGE
) -> int:
    """Pages to reserve for a list of `length` tokens; a pool needs as many for each of its layers x B x K lists.

        tokens = 1.15 * (1 - e) * T + (W + 1) + P        pages = ceil(tokens / page) + 1

    and never more than ceil(T / page), which is a cache that keeps every token. The page on top is for lists that are
    longer than the mean and shared with those that are shorter: on average, half of a list's last page is empty.
    """
    kept = math.ceil(MARGIN * (1.0 - evicted_share) * length) + window + 1 + protect_first
    return min(math.ceil(kept / page) + 1, math.ceil(length / page))
