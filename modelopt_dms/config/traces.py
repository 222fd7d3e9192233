# SPDX-License-Identifier: Apache-2.0
"""How traces are sampled, and where they may be written. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from modelopt_dms.config.output_dir import OutputError, check_owned, unwritable


@dataclass(frozen=True)
class Sampling:
    """How traces are generated; two runs with the same model, prompts and sampling write the same.

    Attributes:
        max_new_tokens: of a trace, at most.
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that hold this much of the probability.
        batch_size: prompts continued together.
        seed: of the sampling.
    """

    max_new_tokens: int = 2048
    temperature: float = 0.6
    top_p: float = 0.95
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("temperature", 0),
        ):
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


def check_traces_output(output: str | Path) -> Path:
    """The file to write, if nothing would be lost.

    Raises:
        OutputError: it is not a .jsonl file, exists, or cannot be written.
    """
    target = Path(output)
    if target.suffix != ".jsonl":
        raise OutputError(f"output={target} must be a .jsonl file")
    if target.exists():
        raise OutputError(f"output={target} exists already; choose another name or remove it")
    if (why := unwritable(target.absolute().parent)) is not None:
        raise OutputError(f"output={target} cannot be written: {why}")
    check_owned(partial_dir(target))
    return target


def partial_dir(target: Path) -> Path:
    """Where traces lie until all are there."""
    return target.with_name(f"{target.name}.partial")
