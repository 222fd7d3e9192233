# SPDX-License-Identifier: Apache-2.0
"""Notices where ModelOpt itself quantizes a DMS model, which plain saving would forget. Importing this registers it.

It is imported while ModelOpt is (see `checkpoints.registration`), and imports nothing else of ours.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from modelopt.torch.quantization.plugins.custom import CUSTOM_POST_CONVERSION_PLUGINS

# In a config: quantizers were put on that `dms_quantization` does not tell of.
FOREIGN = "dms_quantized_by_modelopt"
_BY_US: ContextVar[bool] = ContextVar("modelopt_dms_quantizes", default=False)


@contextmanager
def quantized_by_us() -> Iterator[None]:
    """Inside, quantizers are put on by `modelopt_dms.quantize` or `load`, which write down how."""
    token = _BY_US.set(True)
    try:
        yield
    finally:
        _BY_US.reset(token)


def _notice(model: Any) -> None:
    """Called by ModelOpt once a model has quantizers."""
    config = getattr(model, "config", None)
    if _BY_US.get() or getattr(config, "dms_config", None) is None:
        return
    setattr(config, FOREIGN, True)
    warnings.warn(
        "this DMS model is quantized by mtq.quantize itself: save_pretrained does not keep its quantizers (ModelOpt's "
        "mto.save does), and KV quantizers need an algorithm and data, which presets such as mtq.FP8_KV_CFG alone do "
        "not name (generate refuses them); modelopt_dms.quantize takes the same config and does both",
        stacklevel=2,
    )


CUSTOM_POST_CONVERSION_PLUGINS.add(_notice)
