# SPDX-License-Identifier: Apache-2.0
"""What one layer's cache holds, in numbers."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class PoolSize:
    """Bytes of all pages of a pool, free ones included. Does not keep the pages alive."""

    bytes: int


@dataclass
class Usage:
    """What a layer's cache holds. Outlives the cache: it has numbers only.

    Attributes:
        live: slots in use [B, K].
        tokens: tokens seen [B], padding not counted.
        kv_bytes: bytes allocated for KV rows, the overwritten rows held for a rollback included.
        row_bytes: bytes of one key and value row.
        row_values: numbers in one key and value row.
        pool: the pages from which this layer draws, with others; None if its rows lie in lists of their own.
        log_bytes: of kv_bytes, those of overwritten rows.
    """

    live: Tensor
    tokens: Tensor
    kv_bytes: int
    row_bytes: int
    row_values: int
    pool: PoolSize | None = None
    log_bytes: int = 0

    def synchronized(self) -> "Usage":
        """These numbers, once they are known; see `kvcache.paged_head_caches.PagedUsage`."""
        return self

    @property
    def resident_bytes(self) -> int:
        """Bytes of the rows in use."""
        return int(self.live.sum()) * self.row_bytes

    @property
    def dense_rows(self) -> int:
        """Rows of a cache that keeps every token."""
        return int(self.tokens.sum()) * self.live.shape[1]

    @property
    def dense_bytes(self) -> int:
        """Bytes that a cache which keeps every token would need."""
        return self.dense_rows * self.row_bytes

    @property
    def bf16_bytes(self) -> int:
        """Bytes that a cache which keeps every token in bfloat16 would need."""
        return self.dense_rows * self.row_values * 2
