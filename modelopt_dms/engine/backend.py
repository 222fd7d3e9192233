# SPDX-License-Identifier: Apache-2.0
"""What a session asks of whatever runs the graphs."""

from typing import Protocol

from torch import Tensor

from modelopt_dms.engine.state import State


class Backend(Protocol):
    """Runs the graphs of a directory on state of its own.

    Attributes:
        state: of its batch slots; the session reads and writes it between runs.
    """

    state: State

    def run(self, phase: str, feeds: dict[str, Tensor], row: int | None = None) -> Tensor:
        """Run a graph and make its new state the state.

        Args:
            phase: "decode" or "prefill".
            feeds: the inputs that are no state, on the CPU.
            row: of the batch slot that is prefilled; None where all take part.

        Returns:
            Logits [B, V] or [1, V], which the next run may overwrite.
        """
        ...
