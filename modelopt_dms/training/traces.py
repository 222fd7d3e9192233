# SPDX-License-Identifier: Apache-2.0
"""The teacher continues prompts: training data like what the model will write.

traces.jsonl.partial/settings.json   what the run is; going on must agree with it
traces.jsonl.partial/traces.jsonl    one record a trace; renamed to traces.jsonl when all are there
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.config.in_use import in_use
from modelopt_dms.config.output_dir import own, remove, writing
from modelopt_dms.config.traces import Sampling, check_traces_output, partial_dir
from modelopt_dms.data import DataError
from modelopt_dms.data.documents import tokenize_prompts
from modelopt_dms.data.records import Tokens
from modelopt_dms.gates.gate import eviction_off
from modelopt_dms.training.checkpoint import ResumeError, differences, model_digest, write_text

SETTINGS_FILE = "settings.json"
RECORDS_FILE = "traces.jsonl"


def generate_traces(
    model: PreTrainedModel,
    prompts: Any,
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    *,
    count: int | None = None,
    sampling: Sampling | None = None,
    progress: bool = True,
) -> Path:
    """Have a model, with eviction off, continue prompts; interrupted, the same call goes on, bit for bit.

    Args:
        model: a causal LM, converted or not.
        prompts: texts, chat records (answers at their end are left out), token ids, a `datasets.Dataset`, or paths of
            .jsonl, .txt or .parquet files.
        tokenizer: the model's.
        output: the .jsonl file to write; its records {"input_ids", "text", "prompt_tokens"} are data for `compress`.
        count: number of traces, by default one a prompt; prompts are continued in turns if there are fewer.
        sampling: how to generate.
        progress: show a progress bar.

    Returns:
        The path of the file.

    Raises:
        ValueError: prompts, settings or output cannot be used, an interrupted run there was another one, or the disk is
            full; the same call goes on when it is not.
    """
    sampling = sampling or Sampling()
    target = check_traces_output(output)
    starts = tokenize_prompts(prompts, tokenizer, count)
    _check_fits(model, starts, sampling)
    work = partial_dir(target)
    ends = _end_tokens(model, tokenizer)
    settings = _settings(model, starts, sampling, ends)
    model.eval()
    with in_use(work), writing(work):
        _open(work, settings)
        _write_all(model, tokenizer, starts, work, sampling, ends, progress)
        os.replace(work / RECORDS_FILE, target)
        remove(work, (SETTINGS_FILE, f".{SETTINGS_FILE}.partial"))
    return target


def _write_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[Tokens],
    work: Path,
    sampling: Sampling,
    ends: list[int],
    progress: bool,
) -> None:
    """Add the traces that are not there yet, batch by batch."""
    records = work / RECORDS_FILE
    size = sampling.batch_size
    first = -(-_cut_to_whole_batches(records, len(starts), size) // size)
    batches = range(first, -(-len(starts) // size))
    for batch in tqdm(
        batches, "traces", total=first + len(batches), initial=first, disable=not progress
    ):
        group = starts[batch * size : (batch + 1) * size]
        traces = _continue(model, group, sampling, batch, ends)
        lines = [
            json.dumps(
                {"input_ids": ids, "text": tokenizer.decode(ids), "prompt_tokens": len(start)},
                ensure_ascii=False,
            )
            for start, ids in zip(group, traces, strict=True)
        ]
        with records.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def _check_fits(model: PreTrainedModel, starts: Sequence[Tokens], sampling: Sampling) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(int(ids.max()) for ids in starts)
    if highest >= rows:
        raise DataError(
            f"prompts hold token id {highest}, but the model's embedding has {rows} rows"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, starts))
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise DataError(
            f"the longest prompt has {longest} tokens; with max_new_tokens={sampling.max_new_tokens} that is more than "
            f"the model's {limit} positions"
        )


def _settings(
    model: PreTrainedModel, starts: Sequence[Tokens], sampling: Sampling, ends: list[int]
) -> dict[str, dict[str, Any]]:
    prompts = hashlib.sha256()
    for ids in starts:
        prompts.update(f"{len(ids)} ".encode() + ids.tobytes())
    return {
        "sampling": asdict(sampling),
        "prompts": {"count": len(starts), "digest": prompts.hexdigest()[:16]},
        "model": {"class": type(model).__name__, "digest": model_digest(model), "ends": ends},
    }


def _open(work: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Begin a run in a directory, or go on with the one that is there if it is the same."""
    path = work / SETTINGS_FILE
    if not path.exists():
        own(work)
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        different = differences(json.loads(path.read_text(encoding="utf-8")), settings)
    except (OSError, ValueError, AttributeError) as error:
        raise ResumeError(
            f"{path} cannot be read ({error}); remove {work} to start over"
        ) from error
    if different:
        raise ResumeError(
            f"{work} holds an interrupted run with other settings: {', '.join(different)}; "
            "use another output, or remove it to start over"
        )


def _cut_to_whole_batches(records: Path, total: int, batch_size: int) -> int:
    """Remove what an interruption left of its last batch; the number of records that stay."""
    if not records.exists():
        return 0
    with records.open("rb+") as file:
        ends = [0]
        for line in file:
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
        whole = len(ends) - 1
        if whole < total:
            whole -= whole % batch_size
        file.truncate(ends[whole])
    return whole


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


@torch.no_grad()
def _continue(
    model: PreTrainedModel,
    starts: Sequence[Tokens],
    sampling: Sampling,
    batch: int,
    ends: list[int],
) -> list[list[int]]:
    """Prompts and what the model says to them, up to and with the first end token."""
    length = max(map(len, starts))
    ids = np.zeros((len(starts), length), np.int64)
    mask = np.zeros_like(ids)
    for row, start in enumerate(starts):
        ids[row, length - len(start) :] = start
        mask[row, length - len(start) :] = 1
    how: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        how |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), eviction_off(model):
        # Of the batch alone, so that a run that goes on draws what an uninterrupted one does.
        torch.manual_seed(int(np.random.default_rng([sampling.seed, batch]).integers(2**63)))
        out = model.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=0,
            **how,
        )
    return [
        [*start.tolist(), *_until_end(row, ends)]
        for start, row in zip(starts, out[:, length:].tolist(), strict=True)
    ]


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids
