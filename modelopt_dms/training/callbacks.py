# SPDX-License-Identifier: Apache-2.0
"""Who is told how a retrofit goes: Trainer's integrations that the recipe names, and callbacks of the caller."""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    get_reporting_integration_callbacks,
)

from modelopt_dms.config.reporting import check_installed
from modelopt_dms.training.checkpoint import TENSORBOARD_DIR

# transformers' own variable for where TensorBoard's files go.
ELSEWHERE = "TENSORBOARD_LOGGING_DIR"


class StoppedError(RuntimeError):
    """A callback has set `control.should_training_stop` before the last step; the message says how to go on.

    Attributes:
        step: optimizer steps taken, all of them in the checkpoint that was written.
    """

    def __init__(self, step: int, steps: int, directory: Path | None) -> None:
        self.step = step
        kept = (
            "without an output_dir nothing of it was kept"
            if directory is None
            else f"the same call goes on from checkpoint-{step} in {directory}"
        )
        super().__init__(f"a callback stopped the retrofit at step {step} of {steps}; {kept}")


def check_reporting(
    report_to: Sequence[str], callbacks: Sequence[Any], output_dir: str | Path | None
) -> None:
    """Refuse what could not be told how a retrofit goes, before it begins.

    Raises:
        ValueError: a callback that is none, an integration whose package is missing or not set up, or TensorBoard
            without a place for its files.
    """
    for index, callback in enumerate(callbacks):
        kind = callback if inspect.isclass(callback) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise ValueError(
                f"callbacks[{index}]={callback!r}: expected a transformers.TrainerCallback, or a class of them"
            )
    check_installed(report_to)
    if "tensorboard" in report_to and output_dir is None and ELSEWHERE not in os.environ:
        raise ValueError(
            f"retrofit.report_to='tensorboard' writes files: give an output_dir, or set {ELSEWHERE}"
        )
    _integrations(report_to)


def reporters(report_to: Sequence[str], directory: Path | None, begun: int) -> list[Any]:
    """Trainer's callbacks for a recipe's integrations.

    Args:
        report_to: names that were checked.
        directory: where TensorBoard's files go, unless its variable says otherwise; None: in another process.
        begun: the step that the run goes on from; TensorBoard drops what it has of later ones.
    """
    found = _integrations(report_to)
    for callback in found:
        ours = isinstance(callback, TensorBoardCallback) and callback.logging_dir is None
        if ours and directory is not None:
            callback.tb_writer = callback._SummaryWriter(
                str(directory / TENSORBOARD_DIR), purge_step=begun + 1 if begun else None
            )
    return found


def _integrations(report_to: Sequence[str]) -> list[Any]:
    names: Any = "all" if "all" in report_to else list(report_to)
    found = []
    for kind in get_reporting_integration_callbacks(names):
        try:
            found.append(kind())
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"retrofit.report_to={list(report_to)}: {error}") from error
    return found
