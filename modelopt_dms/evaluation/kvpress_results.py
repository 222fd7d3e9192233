# SPDX-License-Identifier: Apache-2.0
"""Results as the evaluation of kvpress 0.5.5 writes them: a folder's name, and its three files. Imports nothing of it.

    DATASET__DATA_DIR__MODEL__PRESS__RATIO/predictions.csv, metrics.json, config.yaml

A compression ratio of kvpress is the share that is evicted: 0.75 where we say 4.
"""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from modelopt_dms.config.output_dir import OutputError, atomic_dir, check_writable

FILES = ("predictions.csv", "metrics.json", "config.yaml")
PRESS, NO_PRESS = "dms", "no_press"
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Prediction:
    """One row of predictions.csv; its fields are the columns.

    Attributes:
        question: text.
        answer_prefix: how the answer begins.
        answer: words that it must have; of tasks "qa", one of them.
        task: name.
        max_new_tokens: that it may take.
        predicted_answer: what was generated behind the begun answer.
        compression_ratio: share of the context's tokens that were evicted before the question, measured.
    """

    question: str
    answer_prefix: str
    answer: tuple[str, ...]
    task: str
    max_new_tokens: int
    predicted_answer: str
    compression_ratio: float

    def score(self) -> float:
        """RULER's string match, 0 to 1: the share of the words, or whether one of them is there."""
        said = _CONTROL.sub("", self.predicted_answer.strip()).strip().lower()
        hits = [x.lower() in said for x in self.answer]
        return float(any(hits)) if self.task.split("_")[0] == "qa" else sum(hits) / len(hits)


@dataclass(frozen=True)
class Setting:
    """What results are about.

    Attributes:
        dataset: name of the data set.
        data_dir: part of it, for RULER the length; None if it has none.
        model: name, with its owner where it has one.
        press_name: of the method.
        compression_ratio: share to evict that was asked for.
        press_init_command: the method in words.
        device: where it ran.
        dtype: of the model.
        seed: of the prompts.
    """

    dataset: str
    data_dir: str | None
    model: str
    press_name: str
    compression_ratio: float
    press_init_command: str
    device: str
    dtype: str
    seed: int

    def folder(self) -> str:
        """The name of the folder."""
        parts = (self.dataset, self.data_dir, self.model.replace("/", "--"), self.press_name)
        return "__".join([*filter(None, parts), f"{self.compression_ratio:.2f}"])

    def config(self, output_dir: Path) -> dict[str, Any]:
        """config.yaml: kvpress' EvaluationConfig, field by field."""
        return {
            "dataset": self.dataset,
            "data_dir": self.data_dir,
            "model": self.model,
            "device": self.device,
            "press_name": self.press_name,
            "compression_ratio": self.compression_ratio,
            "key_channel_compression_ratio": None,
            "fraction": 1.0,
            "max_new_tokens": None,
            "max_context_length": None,
            "query_aware": False,
            "needle_depth": None,
            "compression_interval": None,
            "target_size": None,
            "hidden_states_buffer_size": None,
            "output_dir": str(output_dir),
            "log_level": "INFO",
            "model_kwargs": {"dtype": self.dtype},
            "trust_remote_code": False,
            "press_init_command": self.press_init_command,
            "seed": self.seed,
            "fp8": False,
        }


def metrics(predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
    """metrics.json: the mean string match of each task in percent, tasks in the order of their names."""
    scores: dict[str, list[float]] = {}
    for x in sorted(predictions, key=lambda x: x.task):
        scores.setdefault(x.task, []).append(x.score())
    return {
        task: {"string_match": round(sum(own) / len(own) * 100, 2)} for task, own in scores.items()
    }


def check_directory(directory: Path) -> None:
    """Refuse a place that cannot hold folders of results.

    Raises:
        OutputError: it is a file, cannot be written, or its parent does not exist.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"--kvpress {directory} is a file; expected a directory for results")
    if not directory.absolute().parent.is_dir():
        raise OutputError(f"--kvpress {directory}: {directory.parent} does not exist")
    check_writable(directory / FILES[0])


def write_results(directory: Path, setting: Setting, predictions: Sequence[Prediction]) -> Path:
    """Write a folder of results, completely or not at all; a folder of that name stays, and gets the new one inside.

    Returns:
        The folder.
    """
    place = _free(directory / setting.folder())
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(place) as made:
        with (made / FILES[0]).open("w", newline="", encoding="utf-8") as file:
            rows = [asdict(x) | {"answer": _cell(x.answer)} for x in predictions]
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (made / FILES[1]).write_text(json.dumps(metrics(predictions), indent=4), encoding="utf-8")
        text = yaml.dump(
            setting.config(directory), default_flow_style=False, indent=2, sort_keys=False
        )
        (made / FILES[2]).write_text(text, encoding="utf-8")
    return place


def _free(place: Path) -> Path:
    """The place, or the first of its numbered folders that is not there, as kvpress does."""
    if not place.exists():
        return place
    number = 1
    while (place / str(number)).exists():
        number += 1
    return place / str(number)


def _cell(answers: Sequence[str]) -> str:
    """A list of texts as pandas writes it, which got it as an array."""
    import numpy as np

    return str(np.array(list(answers), dtype=object))
