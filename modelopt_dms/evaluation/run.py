# SPDX-License-Identifier: Apache-2.0
"""What one call of `eval` measures, as rows whose parts can be measured one by one."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from modelopt_dms.evaluation.measure import material_of, metric_of, parts_of
from modelopt_dms.evaluation.memories import knows_records
from modelopt_dms.evaluation.report_page.material import plain_texts
from modelopt_dms.evaluation.score import (
    ACCURACY,
    PERPLEXITY,
    Part,
    add_up,
    open_part,
    text_part,
    texts_of,
)
from modelopt_dms.evaluation.tasks import held_out_text

Row = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """One row, in parts that are measured one by one, so that a run which is stopped goes on behind them.

    Attributes:
        key: task, category if it has one, and length.
        parts: makes prompts or samples, and gives for a few of them at a time what measures them, as JSON.
        join: what they say together: the rest of the row.
    """

    key: Row
    parts: Callable[[], Sequence[Callable[[], Row]]]
    join: Callable[[Sequence[Row]], Row]


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
    _check_room(asked, tasks, material_of)

    def unit(task: str, length: int) -> Unit:
        how = (asked.model, asked.tokenizer, task, length, asked.count, asked.seed)
        return _scored({"task": task, "length": length}, metric_of(task), lambda: parts_of(*how))

    return [unit(task, length) for task in tasks for length in asked.lengths]


def _check_room(asked: Asked, tasks: Sequence[str], make: Callable[..., object]) -> None:
    """Make one prompt of each task and length.

    Raises:
        ValueError: some have no room; all are named.
    """
    errors = []
    for task in tasks:
        for length in asked.lengths:
            try:
                make(asked.tokenizer, task, length, 1, asked.seed)
            except ValueError as error:
                errors.append(str(error))
    if errors:
        raise ValueError("; ".join(errors))


def _scored(key: Row, metric: str, parts: Callable[[], Sequence[Callable[[], Part]]]) -> Unit:
    """A unit whose parts are added up."""

    def join(rows: Sequence[Row]) -> Row:
        return add_up(metric, [Part.of(x["part"]) for x in rows]).row()

    def row(part: Callable[[], Part]) -> Row:
        return {"part": asdict(part())}

    return Unit(key, lambda: [partial(row, x) for x in parts()], join)


def answer_units(asked: Asked, tasks: Sequence[str]) -> list[Unit]:
    """RULER's families at every length, all answers generated; rows have them as "predictions".

    Raises:
        ValueError: a length has no room for a task: before any is measured.
    """
    _check_room(asked, tasks, lambda tokenizer, task, *rest: own_prompts(task, tokenizer, *rest))

    def unit(task: str, length: int) -> Unit:
        where = (task, asked.tokenizer, length, asked.count, asked.seed)
        key = {"task": task, "length": length}
        return _answered(key, asked, lambda: own_prompts(*where))

    return [unit(task, length) for task in tasks for length in asked.lengths]


def dataset_units(asked: Asked, name: str, path: Path) -> list[Unit]:
    """The tasks of a file with kvpress' columns, likewise; `name` is the category of their rows."""
    tasks: dict[str, list[TextPrompt]] = {}
    for x in dataset_prompts(path, asked.tokenizer):
        tasks.setdefault(x.task, []).append(x)

    def unit(task: str, prompts: list[TextPrompt]) -> Unit:
        length = max(len(x.prompt.context_ids) + len(x.prompt.prompt_ids) for x in prompts)
        key = {"task": task, "category": name, "length": length}
        return _answered(key, asked, lambda: prompts)

    return [unit(task, prompts) for task, prompts in tasks.items()]


def _answered(key: Row, asked: Asked, prompts: Callable[[], Sequence[TextPrompt]]) -> Unit:
    """Generated answers to prompts, scored as RULER and kvpress do."""

    def part(prompt: TextPrompt) -> Row:
        found, said = open_part(asked.model, asked.tokenizer, prompt.prompt)
        prediction = Prediction(
            prompt.question,
            prompt.answer_prefix,
            prompt.prompt.wanted,
            prompt.task,
            prompt.prompt.tokens,
            said,
            1.0 - found.context.resident_tokens / found.context.context_tokens,
        )
        scored = replace(found, total=prediction.score())
        return {"part": asdict(scored), "prediction": asdict(prediction)}

    def join(rows: Sequence[Row]) -> Row:
        score = add_up(ACCURACY, [Part.of(x["part"]) for x in rows])
        return {**score.row(), "predictions": [x["prediction"] for x in rows]}

    return Unit(key, lambda: [partial(part, x) for x in prompts()], join)


def file_units(asked: Asked, files: Sequence[Path], format: str | None) -> list[Unit]:
    """Perplexity of a user's files at every length; rows name files that no sample is of, as "unused".

    Raises:
        ValueError: unusable files, or none has a document of so many tokens: before anything is measured.
    """
    documents = [(str(path), _open(asked, path, format)) for path in files]

    def unit(length: int) -> Unit:
        samples, unused = cut_files(documents, length, asked.count)

        def parts() -> list[Callable[[], Part]]:
            return [partial(text_part, asked.model, batch) for batch in texts_of(samples)]

        scored = _scored({"task": "data", "length": length}, PERPLEXITY, parts)

        def join(rows: Sequence[Row]) -> Row:
            row = {**scored.join(rows), "samples": len(samples)}
            return {**row, "unused": unused} if unused else row

        return replace(scored, join=join)

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

        def part() -> Row:
            return {**distance(asked.model, samples), "samples": len(samples)}

        # In one part: the percentiles are of all tokens.
        key = {"task": FIDELITY, "category": name, "length": length}
        return Unit(key, lambda: [part], lambda rows: rows[0])

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
