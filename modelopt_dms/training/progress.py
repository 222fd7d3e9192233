# SPDX-License-Identifier: Apache-2.0
"""How far a retrofit is: the ratio that a step asks for, log rows, a progress bar."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from modelopt_dms.config.output_dir import writing
from modelopt_dms.training.checkpoint import LOG_FILE, PROGRESS_FILE, write_text

# Averaged over the micro-steps of a logging interval.
AVERAGED = ("loss", "kl", "rate", "evicted_soft", "evicted_hard", "compression_ratio")

Row = dict[str, float]


def scheduled_cr(step: int, steps: int, target_cr: float, ramp_fraction: float) -> float:
    """Compression ratio asked for at a step: from 1 at step 0 linearly to `target_cr`, then constant.

    Args:
        step: optimizer steps already taken, 0-based.
        steps: optimizer steps of the whole retrofit.
        target_cr: final compression ratio, >= 1.
        ramp_fraction: share of `steps` over which the ratio rises; 0 asks for all of it at once.
    """
    progress = 1.0 if ramp_fraction == 0.0 else min(1.0, step / (ramp_fraction * steps))
    return 1.0 + (target_cr - 1.0) * progress


def drawn_cr(step: int, lowest: float, highest: float, seed: int) -> float:
    """Compression ratio drawn for a step, uniform in its logarithm: the same on every process and after a resume."""
    part = np.random.default_rng([seed, 3, step]).random()
    return math.exp(math.log(lowest) + part * math.log(highest / lowest))


class Progress:
    """Rows of the log, each the means over one logging interval; kept in the checkpoints, so that a resume goes on."""

    def __init__(self, steps: int, directory: Path | None, *, show: bool) -> None:
        self.steps, self.directory, self.show = steps, directory, show
        self.rows: list[Row] = []
        self.seconds = 0.0
        self._sums = dict.fromkeys(AVERAGED, 0.0)
        self._count = 0
        self._bar: Any = None

    def start(self, step: int) -> None:
        """Open the outputs, at the step from which the run goes on; rows of later steps are dropped from them."""
        self._begun = time.perf_counter() - self.seconds
        self._bar = tqdm(
            total=self.steps, initial=step, desc="retrofit", unit="step", disable=not self.show
        )
        if self.directory is not None:
            with writing(self.directory):
                write_text(
                    self.directory / LOG_FILE, "".join(json.dumps(row) + "\n" for row in self.rows)
                )

    def add(self, values: Mapping[str, float]) -> None:
        """Take in the values of one micro-step."""
        for name in AVERAGED:
            self._sums[name] += values[name]
        self._count += 1
        self._latest = values

    def step(self, step: int, scheduled: Mapping[str, float]) -> None:
        """End an optimizer step, and draw; `scheduled` values are not averaged."""
        self.seconds = time.perf_counter() - self._begun
        self._scheduled = {"step": step, **scheduled}
        self._bar.set_postfix_str(
            f"CR {self._latest['compression_ratio']:.2f} of {scheduled['target_cr']:.2f} "
            f"KL {self._latest['kl']:.4f} "
            f"evicted {self._latest['evicted_soft']:.3f} soft {self._latest['evicted_hard']:.3f} hard "
            f"lr {scheduled['learning_rate']:.1e}",
            refresh=False,
        )
        self._bar.update()

    def log(self) -> Row:
        """End a logging interval with a row."""
        row = {**self._scheduled, **{name: x / self._count for name, x in self._sums.items()}}
        self.rows.append(row)
        self._sums, self._count = dict.fromkeys(AVERAGED, 0.0), 0
        if self.directory is not None:
            with (
                writing(self.directory),
                (self.directory / LOG_FILE).open("a", encoding="utf-8") as log,
            ):
                log.write(json.dumps(row) + "\n")
        return row

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def save(self, checkpoint: Path) -> None:
        """Write what a resume needs."""
        state = {
            "rows": self.rows,
            "seconds": self.seconds,
            "sums": self._sums,
            "count": self._count,
        }
        (checkpoint / PROGRESS_FILE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote."""
        state = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
        self.rows, self.seconds = state["rows"], state["seconds"]
        self._sums, self._count = state["sums"], state["count"]
