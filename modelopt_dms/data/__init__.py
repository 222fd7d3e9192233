# SPDX-License-Identifier: Apache-2.0
"""From what a user has to packed samples of token ids. Knows no training."""

from modelopt_dms.data.batches import calibration_batches
from modelopt_dms.data.documents import ACCEPTED, Documents, Formatted, open_documents
from modelopt_dms.data.errors import DataError
from modelopt_dms.data.mixing import PreparedData, Tally, prepare_samples
from modelopt_dms.data.packing import Samples, pack_and_split, pad
from modelopt_dms.data.prompts import tokenize_prompts
from modelopt_dms.data.records import Tokens
from modelopt_dms.data.sources import Blend, Source, open_sources, parse_data, read_once
from modelopt_dms.data.visits import Visits

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
