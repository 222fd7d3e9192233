# SPDX-License-Identifier: Apache-2.0
"""From what a user has to packed samples of token ids. Knows no training.

A name is imported when it is used: what the command line checks first needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelopt_dms.data.batches import calibration_batches
    from modelopt_dms.data.documents import ACCEPTED, Documents, open_documents
    from modelopt_dms.data.inputs import Blend, Formatted, parse_data
    from modelopt_dms.data.mixing import PreparedData, Tally, prepare_samples
    from modelopt_dms.data.packing import Samples, pack_and_split, pad
    from modelopt_dms.data.prompts import tokenize_prompts
    from modelopt_dms.data.records import Tokens
    from modelopt_dms.data.sources import Source, open_sources, read_once
    from modelopt_dms.data.visits import Visits

_HOME = {
    "ACCEPTED": "documents",
    "Blend": "inputs",
    "Documents": "documents",
    "Formatted": "inputs",
    "PreparedData": "mixing",
    "Samples": "packing",
    "Source": "sources",
    "Tally": "mixing",
    "Tokens": "records",
    "Visits": "visits",
    "calibration_batches": "batches",
    "open_documents": "documents",
    "open_sources": "sources",
    "pack_and_split": "packing",
    "pad": "packing",
    "parse_data": "inputs",
    "prepare_samples": "mixing",
    "read_once": "sources",
    "tokenize_prompts": "prompts",
}

__all__ = [
    "ACCEPTED",
    "Blend",
    "DataError",
    "Documents",
    "Formatted",
    "PreparedData",
    "Samples",
    "Source",
    "Tally",
    "Tokens",
    "Visits",
    "calibration_batches",
    "open_documents",
    "open_sources",
    "pack_and_split",
    "pad",
    "parse_data",
    "prepare_samples",
    "read_once",
    "tokenize_prompts",
]


class DataError(ValueError):
    """Training data that cannot be used; the message says which item and why."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
