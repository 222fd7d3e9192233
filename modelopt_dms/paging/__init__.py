# SPDX-License-Identifier: Apache-2.0
"""KV rows in pages on a device: a pool that layers share, and each layer's slots in it."""

from modelopt_dms.ops.prefill_reference import NEVER
from modelopt_dms.paging.pool import SharedPool
from modelopt_dms.paging.slots import PagedSlots, PagedUsage

__all__ = ["NEVER", "PagedSlots", "PagedUsage", "SharedPool"]
