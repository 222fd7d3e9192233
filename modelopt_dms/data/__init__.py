# SPDX-License-Identifier: Apache-2.0
"""From what a user has to packed samples of token ids."""

from typing import Any


class DataError(ValueError):
    """Data that cannot be used; the message says which item and why."""


def __getattr__(name: str) -> Any:
    """`open_documents`, imported when it is asked for: errors must not wait for `datasets` and transformers."""
    if name != "open_documents":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modelopt_dms.data.documents import open_documents

    return open_documents
