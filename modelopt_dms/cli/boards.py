# SPDX-License-Identifier: Apache-2.0
"""Results of eval as files of kvpress' evaluation: what --kvpress and its companions mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_dms.evaluation.kvpress_results import check_directory
from modelopt_dms.evaluation.names import RULER, check_ruler

if TYPE_CHECKING:
    from modelopt_dms.evaluation.run import Asked, Unit

# What prompts that are made here are called; "ruler" is kvpress' data set, of other texts.
OWN_DATASET = "modelopt_dms-ruler"


@dataclass(frozen=True)
class Board:
    """Where results go, and what they are about.

    Attributes:
        directory: holds a folder for each data set.
        model: name there.
        data: name of a data set of the user's, "ruler/4096", and its file.
    """

    directory: Path
    model: str
    data: tuple[str, Path] | None

    def units(self, asked: "Asked", tasks: Sequence[str]) -> "list[Unit]":
        """What is measured for it."""
        from modelopt_dms.evaluation.run import answer_units, dataset_units

        own = answer_units(asked, tasks)
        return own if self.data is None else own + dataset_units(asked, *self.data)

    def write(self, asked: "Asked", rows: Sequence[dict[str, Any]], cr: float | None) -> list[Path]:
        """Write the folders, and give their paths."""
        from modelopt_dms.evaluation.kvpress_results import Prediction, Setting, write_results

        folders: dict[tuple[str, str | None], list[Prediction]] = {}
        for row in rows:
            if "predictions" not in row:
                continue
            name, _, part = (row.get("category") or f"{OWN_DATASET}/{row['length']}").partition("/")
            own = folders.setdefault((name, part or None), [])
            own += [Prediction(**x | {"answer": tuple(x["answer"])}) for x in row["predictions"]]
        written = []
        for where, predictions in folders.items():
            setting = Setting(*where, model=self.model, **_method(asked.model, cr), seed=asked.seed)
            written.append(write_results(self.directory, setting, predictions))
        return written


def _method(model: Any, cr: float | None) -> dict[str, Any]:
    """Press, share to evict, the method in words, device and dtype, as fields of `Setting`."""
    from modelopt_dms.evaluation.kvpress_results import NO_PRESS, PRESS
    from modelopt_dms.gates.gate import gates

    found = gates(model)
    words, press, share = str(None), NO_PRESS, 0.0
    if any(gate.enabled for gate in found):
        asked = model.config.dms_config["target_cr"] if cr is None else cr
        words = (
            f"modelopt_dms(compression_ratio={asked:g}x, window={found[0].window}, decoding=True)"
        )
        press, share = PRESS, 1.0 - 1.0 / asked
    return {
        "press_name": press,
        "compression_ratio": share,
        "press_init_command": words,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def board(directory: Path | None, data: str | None, model: str | None, place: str) -> Board | None:
    """What the options say; None without --kvpress.

    Raises:
        ValueError: one of them is missing or cannot be read.
    """
    if directory is None:
        for option, value in (("--kvpress-data", data), ("--kvpress-model", model)):
            if value is not None:
                raise ValueError(
                    f"{option} {value}: --kvpress is missing, the directory for results"
                )
        return None
    check_directory(directory)
    return Board(
        directory, model or Path(place).resolve().name, None if data is None else _data(data)
    )


def _data(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if not name or not file or name.count("/") > 1 or "__" in name:
        raise ValueError(
            f"--kvpress-data {text!r} must be NAME=FILE or NAME/PART=FILE, such as ruler/4096=test.parquet"
        )
    if not Path(file).is_file():
        raise ValueError(f"--kvpress-data {text!r}: {file} does not exist or is not a file")
    from modelopt_dms.evaluation.kvpress_prompts import dataset_rows

    dataset_rows(Path(file))  # what is wrong with it is said before a model is loaded
    return name, Path(file)


def board_tasks(wanted: tuple[str, ...], found: Board) -> tuple[str, ...]:
    """The tasks of a board: RULER's families, unless there is a data set.

    Raises:
        ValueError: others are wanted.
    """
    check_ruler(wanted)
    return wanted if wanted or found.data is not None else RULER
