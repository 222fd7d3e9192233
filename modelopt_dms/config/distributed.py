# SPDX-License-Identifier: Apache-2.0
"""The processes of one run, as torchrun or accelerate started them."""

import os


def count() -> int:
    """How many there are; Trainer reads the same variable."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Return when every process has come here; at once if there is only this one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
