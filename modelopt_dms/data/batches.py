# SPDX-License-Identifier: Apache-2.0
"""The data a retrofit learns from -> the batches that quantization measures its ranges on."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.data import DataError
from modelopt_dms.data.mixing import open_sources, read_once
from modelopt_dms.data.packing import pack
from modelopt_dms.data.records import Tokens


def calibration_batches(
    model: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int,
    length: int,
    batch_size: int,
) -> list[dict[str, Tensor]]:
    """Packed samples of the first documents, the fullest ones, as input_ids and position_ids [B, T].

    At most `samples` of `length` tokens; fewer if the data end before. `data` as in `documents.ACCEPTED`.

    Raises:
        DataError: data are missing, empty or not of this model.
    """
    documents: list[Tokens] = []
    total = 0
    for document in read_once(open_sources(data, tokenizer, model), None):
        documents.append(document)
        total += len(document)
        if total >= samples * length:
            break
    if total == 0:
        raise DataError(f"all {len(documents)} documents are empty")
    packed = pack(documents, min(length, total))
    fullest = (packed.tokens_ahead < 0).sum(dim=1).argsort(stable=True)[:samples]
    chosen = packed.select(fullest)
    parts = (chosen.batch(slice(i, i + batch_size)) for i in range(0, len(chosen), batch_size))
    return [{name: part[name] for name in ("input_ids", "position_ids")} for part in parts]
