# SPDX-License-Identifier: Apache-2.0
"""From what a user has to packed samples of token ids. Knows no training."""

from modelopt_dms.data.batches import calibration_batches
from modelopt_dms.data.documents import ACCEPTED, DataError, Documents, Tokens, open_documents
from modelopt_dms.data.packing import PreparedData, Samples, Visits, pack_and_split, pad

__all__ = [
    "ACCEPTED",
    "DataError",
    "Documents",
    "PreparedData",
    "Samples",
    "Tokens",
    "Visits",
    "calibration_batches",
    "open_documents",
    "pack_and_split",
    "pad",
]
