# SPDX-License-Identifier: Apache-2.0
"""What one call of `eval` measures, as rows that can be measured one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.data.documents import open_documents
from modelopt_dms.data.inputs import Formatted
from modelopt_dms.evaluation.fidelity import fidelity
from modelopt_dms.evaluation.files import cut_documents
from modelopt_dms.evaluation.limits import FIDELITY
from modelopt_dms.evaluation.memories import knows_records
from modelopt_dms.evaluation.report_page.material import plain_texts
from modelopt_dms.evaluation.score import material_of, measure, perplexity
from modelopt_dms.evaluation.tasks import held_out_text

Row = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """One row.

    Attributes:
        key: task, category if it has one, and length.
        measure: gives the rest.
    """

    key: Row
    measure: Callable[[], Row]


@dataclass(frozen=True)
class Asked:
    """A model, and how much is asked of it.

    Attributes:
        model: in eval mode.
        tokenizer: the model's.
        lengths: tokens.
        count: samples of a task and length.
        seed: draws them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lengths: Sequence[int]
    count: int
    seed: int


def task_units(asked: Asked, tasks: Sequence[str]) -> list[Unit]:
    """Tasks at every length.

    Raises:
        ValueError: a length has no room for a task: before any is measured.
    """
    for task in tasks:
        for length in asked.lengths:
            material_of(asked.tokenizer, task, length, 1, asked.seed)

    def unit(task: str, length: int) -> Unit:
        how = (asked.model, asked.tokenizer, task, length, asked.count, asked.seed)
        return Unit({"task": task, "length": length}, lambda: measure(*how).row())

    return [unit(task, length) for task in tasks for length in asked.lengths]


def file_units(asked: Asked, files: Sequence[Path] | Formatted) -> list[Unit]:
    """Perplexity of a user's files at every length.

    Raises:
        ValueError: unusable files, or none has a document of so many tokens: before anything is measured.
    """
    documents = open_documents(files, asked.tokenizer, asked.model)

    def unit(length: int) -> Unit:
        samples = cut_documents(documents, length, asked.count)

        def run() -> Row:
            return {**perplexity(asked.model, samples).row(), "samples": len(samples)}

        return Unit({"task": "data", "length": length}, run)

    return [unit(length) for length in asked.lengths]


def fidelity_units(asked: Asked, files: Sequence[Path], format: str | None) -> list[Unit]:
    """Distance from the full cache at every length: each file is a category; without files, texts of the package.

    Raises:
        ValueError: unusable files, or no text has so many tokens: before anything is measured.
    """
    categories = {path.stem: path for path in files}
    if len(categories) != len(files):
        raise ValueError(
            "--data: each file is a category of its own here, so their names must differ"
        )
    names = [*categories] or _built_in(asked, 64, 1).keys()

    def unit(name: str, length: int) -> Unit:
        if categories:
            paths = [categories[name]]
            source = paths if format is None else Formatted(paths, format)
            documents = open_documents(source, asked.tokenizer, asked.model)
            samples = cut_documents(documents, length, asked.count)
        else:
            samples = _built_in(asked, length, asked.count)[name]
        if not samples:
            raise ValueError(
                f"--fidelity: the package's {name} has fewer than {length} tokens; choose shorter lengths, or --data"
            )
        return Unit(
            {"task": FIDELITY, "category": name, "length": length},
            lambda: {**distance(asked.model, samples), "samples": len(samples)},
        )

    return [unit(name, length) for name in names for length in asked.lengths]


def distance(model: PreTrainedModel, samples: Sequence[Sequence[int]]) -> Row:
    """Fidelity of samples of one length as a row."""
    found = fidelity(model, {"": samples})[""]
    length = len(samples[0])
    return {
        "metric": "kl",
        "value": found.kl,
        "count": found.tokens,
        "context_tokens": float(length),
        "resident_tokens": length / found.compression_ratio,
        "compression_ratio": found.compression_ratio,
        "kl_p95": found.kl_p95,
        "kl_p99": found.kl_p99,
        "kl_max": found.kl_max,
        "top1": found.top1,
        "perplexity": found.perplexity,
        "perplexity_full": found.perplexity_full,
    }


def _built_in(asked: Asked, length: int, count: int) -> dict[str, list[list[int]]]:
    """Samples by category of text that is never calibrated on."""
    if knows_records(asked.tokenizer):
        return {"code": held_out_text(asked.tokenizer, length, count, asked.seed)}
    texts = plain_texts(asked.tokenizer, length * count, asked.seed)
    return {
        name: [ids[i * length : (i + 1) * length] for i in range(len(ids) // length)]
        for name, ids in texts.items()
    }
