# SPDX-License-Identifier: Apache-2.0
"""What one call of `eval` measures, as rows that can be measured one by one."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.data.documents import Documents, open_documents
from modelopt_dms.data.inputs import Formatted
from modelopt_dms.evaluation.fidelity import fidelity
from modelopt_dms.evaluation.files import cut_documents, cut_files
from modelopt_dms.evaluation.kvpress_prompts import TextPrompt, dataset_prompts, own_prompts
from modelopt_dms.evaluation.kvpress_results import Prediction
from modelopt_dms.evaluation.limits import FIDELITY
from modelopt_dms.evaluation.memories import knows_records
from modelopt_dms.evaluation.report_page.material import plain_texts
from modelopt_dms.evaluation.score import (
    Said,
    answer_open,
    material_of,
    mean_score,
    measure,
    perplexity,
)
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


def answer_units(asked: Asked, tasks: Sequence[str]) -> list[Unit]:
    """RULER's families at every length, all answers generated; rows have them as "predictions".

    Raises:
        ValueError: a length has no room for a task: before any is measured.
    """
    for task in tasks:
        for length in asked.lengths:
            own_prompts(task, asked.tokenizer, length, 1, asked.seed)

    def unit(task: str, length: int) -> Unit:
        def run() -> Row:
            where = (asked.tokenizer, length, asked.count, asked.seed)
            return answered(asked, own_prompts(task, *where))

        return Unit({"task": task, "length": length}, run)

    return [unit(task, length) for task in tasks for length in asked.lengths]


def dataset_units(asked: Asked, name: str, path: Path) -> list[Unit]:
    """The tasks of a file with kvpress' columns, likewise; `name` is the category of their rows."""
    tasks: dict[str, list[TextPrompt]] = {}
    for x in dataset_prompts(path, asked.tokenizer):
        tasks.setdefault(x.task, []).append(x)

    def unit(task: str, prompts: list[TextPrompt]) -> Unit:
        length = max(len(x.prompt.context_ids) + len(x.prompt.prompt_ids) for x in prompts)
        key = {"task": task, "category": name, "length": length}
        return Unit(key, lambda: answered(asked, prompts))

    return [unit(task, prompts) for task, prompts in tasks.items()]


def answered(asked: Asked, prompts: Sequence[TextPrompt]) -> Row:
    """Generated answers to prompts, scored as RULER and kvpress do."""
    said = answer_open(asked.model, asked.tokenizer, [x.prompt for x in prompts])
    rows = [_prediction(x, y) for x, y in zip(prompts, said, strict=True)]
    score = mean_score([x.score() for x in rows], said)
    return {**score.row(), "predictions": [asdict(x) for x in rows]}


def _prediction(prompt: TextPrompt, said: Said) -> Prediction:
    return Prediction(
        prompt.question,
        prompt.answer_prefix,
        prompt.prompt.wanted,
        prompt.task,
        prompt.prompt.tokens,
        said.text,
        1.0 - said.context.resident_tokens / said.context.context_tokens,
    )


def file_units(asked: Asked, files: Sequence[Path], format: str | None) -> list[Unit]:
    """Perplexity of a user's files at every length; rows name files that no sample is of, as "unused".

    Raises:
        ValueError: unusable files, or none has a document of so many tokens: before anything is measured.
    """
    documents = [(str(path), _open(asked, path, format)) for path in files]

    def unit(length: int) -> Unit:
        samples, unused = cut_files(documents, length, asked.count)

        def run() -> Row:
            row = {**perplexity(asked.model, samples).row(), "samples": len(samples)}
            return {**row, "unused": unused} if unused else row

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
            documents = _open(asked, categories[name], format)
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


def _open(asked: Asked, path: Path, format: str | None) -> Documents:
    source = [path] if format is None else Formatted([path], format)
    return open_documents(source, asked.tokenizer, asked.model)


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
