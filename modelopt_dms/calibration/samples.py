# SPDX-License-Identifier: Apache-2.0
"""Documents -> what gates are fitted to, and what they are judged on."""

from collections.abc import Iterable
from dataclasses import dataclass

from modelopt_dms.config.calibrate import CalibrateConfig
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.data import DataError
from modelopt_dms.data.packing import Samples, pad
from modelopt_dms.data.records import Tokens


@dataclass(frozen=True)
class CalibrationData:
    """Samples to fit to, longest first, and samples to set thresholds and measure quality on."""

    fit: Samples
    held_out: Samples


def draw(documents: Iterable[Tokens], config: CalibrateConfig, dms: DMSConfig) -> CalibrationData:
    """Cut documents into samples, in the order given; read no more of them than needed.

    Raises:
        DataError: fewer than two documents, or parts of them, are longer than the delay window.
    """
    wanted = config.samples + config.held_out
    shortest = dms.window + 2 + dms.protect_first
    pieces: list[Tokens] = []
    longest = 0
    for document in documents:
        longest = max(longest, len(document))
        for start in range(0, len(document), config.sample_length):
            piece = document[start : start + config.sample_length]
            if len(piece) >= shortest:
                pieces.append(piece)
        if len(pieces) >= wanted:
            break
    if len(pieces) < 2:
        raise DataError(
            f"nothing to calibrate on: at least two samples of {shortest} tokens or more are needed "
            f"(window={dms.window}, sample_length={config.sample_length}), but the longest document has {longest}"
        )
    held = config.held_out if len(pieces) >= wanted else max(1, len(pieces) // 5)
    held = min(held, config.held_out)
    pieces = pieces[:wanted]
    # Spread over all that was read: thresholds from one document would be that document's.
    chosen = {round((i + 0.5) * len(pieces) / held - 0.5) for i in range(held)}
    held_out = [x for i, x in enumerate(pieces) if i in chosen]
    fit = sorted((x for i, x in enumerate(pieces) if i not in chosen), key=len, reverse=True)
    return CalibrationData(pad(fit, len(fit[0])), pad(held_out, config.sample_length))
