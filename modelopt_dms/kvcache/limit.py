# SPDX-License-Identifier: Apache-2.0
"""What a limit of a cache's memory means on a device: bytes, a size with a unit, or a share of what is free."""

import os

import torch
from accelerate.utils import convert_file_size_to_int  # type: ignore[import-untyped]


def limit_in_bytes(limit: int | str, device: torch.device) -> int:
    """What a limit of a cache means on a device.

    Args:
        limit: bytes, "40GiB" (or KiB, MiB, KB, MB, GB), or "80%" of the memory that is free now.
        device: whose memory.

    Raises:
        ValueError: it is none of these, or less than a byte.
    """
    found = 0
    try:
        if isinstance(limit, str) and limit.endswith("%"):
            share = float(limit[:-1]) / 100
            found = int(free_bytes(device) * share) if 0 < share <= 1 else 0
        elif isinstance(limit, int | str):
            found = int(convert_file_size_to_int(limit))
    except (ValueError, OverflowError):
        pass
    if found < 1:
        raise ValueError(
            f"max_cache_bytes={limit!r} must be a number of bytes from 1 on, a size such as '40GiB', or a share of the "
            "free memory from above 0% to '100%'"
        )
    return found


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses; on a CPU, file buffers that the system could take back are not in it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
