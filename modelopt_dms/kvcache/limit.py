# SPDX-License-Identifier: Apache-2.0
"""What a limit of a cache's memory means: bytes, a size with a unit, or a share of what is free. Imports no torch."""

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SIZE = re.compile(r"(\d+) ?(?:([KMGT])(i?)(B?))?", re.IGNORECASE)
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4}


def limit_in_bytes(limit: int | str, device: "torch.device") -> int:
    """What a limit of a cache means on a device; see `check_limit`."""
    check_limit(limit)
    if isinstance(limit, str) and limit.endswith("%"):
        return int(free_bytes(device) * float(limit[:-1]) / 100)
    return _size(limit)


def check_limit(limit: int | str, name: str = "max_cache_bytes=") -> None:
    """Refuse what is no limit, without asking a device.

    Args:
        limit: bytes; "40GiB", "512M" (powers of 1024) or "40GB" (of 1000); or "80%" of the memory that is free.
        name: of what is limited, for the message.

    Raises:
        ValueError: it is none of these, or less than a byte.
    """
    if isinstance(limit, str) and limit.endswith("%"):
        fits = re.fullmatch(r"\d+(\.\d+)?", limit[:-1]) is not None and 0 < float(limit[:-1]) <= 100
    else:
        fits = _size(limit) > 0
    if not fits:
        raise ValueError(
            f"{name}{limit!r} must be a number of bytes from 1 on, a size such as '40GiB' or '512M', or a "
            "share of the free memory from above 0% to '100%'"
        )


def free_bytes(device: "torch.device") -> int:
    """Memory of a device that nobody uses; on a CPU, file buffers that the system could take back are not in it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(limit: object) -> int:
    """Bytes of a number, or of a number with a unit; 0 of anything else."""
    found = _SIZE.fullmatch(str(limit)) if isinstance(limit, int | str) else None
    if found is None:
        return 0
    number, unit, binary, byte = found.groups()
    if unit is None:
        return int(number)
    base = 1000 if byte and not binary else 1024
    return int(number) * base ** _POWER[unit.lower()]
