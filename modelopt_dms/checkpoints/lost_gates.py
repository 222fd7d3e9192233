# SPDX-License-Identifier: Apache-2.0
"""Weights of gates that transformers would report as unexpected and drop are an error, whatever config was passed.

Importing this registers a renaming of weights for all models, by which every name in a checkpoint is looked at. It is
imported while transformers is (see `registering`), and imports nothing else of ours.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming

# Renamings that transformers applies to the checkpoints of all models.
ALL_MODELS = "legacy"
# Not those of a PEFT adapter, which is loaded into a model that has gates.
OUR_GATE = re.compile(r"^(?!base_model\.).*\.dms_gate\.")
NVIDIA_GATE = re.compile(r"\.dms_proj_alpha")
_PUT_ON_LATER: ContextVar[bool] = ContextVar("modelopt_dms_gates_put_on_later", default=False)


@contextmanager
def gates_put_on_later() -> Iterator[None]:
    """Inside, transformers may drop the weights of gates: they are read from the files afterwards."""
    token = _PUT_ON_LATER.set(True)
    try:
        yield
    finally:
        _PUT_ON_LATER.reset(token)


class GateNames(WeightRenaming):
    """Renames nothing; raises at the name of a gate's weight that nothing will load."""

    __slots__ = ()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name as it is.

        Raises:
            ValueError: it is a gate's.
        """
        if not _PUT_ON_LATER.get():
            if OUR_GATE.search(source_key):
                raise ValueError(
                    f"{source_key} is a DMS gate's, and the model would be loaded without it: its config is not the "
                    "one that was saved (config=... was passed, or config.json lost quantization_config); leave "
                    "config out, or use modelopt_dms.load"
                )
            if NVIDIA_GATE.search(source_key) and not _runs_remote_code():
                raise ValueError(
                    f"{source_key} is the gate's of one of NVIDIA's DMS checkpoints, and the model would be loaded "
                    "without it; use modelopt_dms.load"
                )
        return source_key, None


def _runs_remote_code() -> bool:
    """Whether a checkpoint's own code was imported: NVIDIA's has these weights."""
    return any(x.startswith("transformers_modules.") for x in sys.modules)


register_checkpoint_conversion_mapping(
    ALL_MODELS,
    [*get_checkpoint_conversion_mapping(ALL_MODELS), GateNames("dms_gate", "dms_gate")],
    overwrite=True,
)
