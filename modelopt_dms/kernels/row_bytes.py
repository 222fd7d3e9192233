# SPDX-License-Identifier: Apache-2.0
"""Bytes of stored KV rows and of what is kept beside them. Numbers only, without torch: plans count by them, too."""

from typing import Literal

PAGE = 64  # slots
BLOCK = 16  # values of a row that share an NVFP4 scale
SCALE_BYTES = 4  # a float32 scale of a row

Number = Literal["plain", "fp8", "int8", "nvfp4"]


def row_bytes(number: Number, dim: int, itemsize: int = 1, per_row: bool = False) -> int:
    """Bytes of a stored row, scales included.

    Args:
        number: "plain" is the model's own dtype.
        dim: numbers in the row.
        itemsize: bytes of one, if plain.
        per_row: fp8 and int8: every row has a float32 scale of its own.
    """
    if number == "plain":
        return dim * itemsize
    if number == "nvfp4":
        # Two numbers a byte, and an e4m3 scale a block.
        return -(-dim // 2) + -(-dim // BLOCK)
    return dim + (SCALE_BYTES if per_row else 0)


def list_bytes(window: int, pages: int) -> int:
    """Bytes of a list besides its rows: slots and marks of the ring, page table, length and tokens seen.

    Args:
        window: delay window W; the ring has W + 1 columns.
        pages: that the list can own.
    """
    return (window + 1) * (4 + 1) + 4 * pages + 2 * 4
