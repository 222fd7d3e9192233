# SPDX-License-Identifier: Apache-2.0
"""Traces are what the teacher says, whole or not there, and the same however often they were interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, build_dms, greedy_without_cache, tokens
from transformers import AutoTokenizer

import modelopt_dms as dms
from modelopt_dms.config.bundled import embedded_model_dir
from modelopt_dms.data.documents import open_documents
from modelopt_dms.gates.gate import eviction_off
from modelopt_dms.training import traces

TOKENIZER = AutoTokenizer.from_pretrained(embedded_model_dir())
PROMPTS = [tokens(1, n, seed=n)[0].tolist() for n in (3, 9, 5, 7, 4)]
SAMPLING = traces.Sampling(max_new_tokens=6, temperature=1.0, top_p=0.9, batch_size=2, seed=3)
GREEDY = traces.Sampling(max_new_tokens=6, temperature=0.0, batch_size=5)


# The models of families.py have no end token, and we would fall back on the tokenizer's.
NEVER = [10**6]


def generate(model: Any, output: Path, prompts: Any = PROMPTS, **options: Any) -> Any:
    options = {"sampling": SAMPLING, "progress": False} | options
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = NEVER
    dms.generate_traces(model, prompts, TOKENIZER, output, **options)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_traces_of_a_converted_model_are_its_teachers_and_padding_leaves_no_trace(
    tmp_path: Path,
) -> None:
    model = build_dms("llama")
    found = generate(model, tmp_path / "a.jsonl", sampling=GREEDY)
    with eviction_off(model):
        for record, prompt in zip(found, PROMPTS, strict=True):
            alone = greedy_without_cache(model, torch.tensor([prompt]), 6)
            assert record["input_ids"] == alone[0].tolist()
            assert record["prompt_tokens"] == len(prompt)
    assert [x.name for x in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_trace_ends_with_its_first_end_token(tmp_path: Path) -> None:
    model = build("llama")
    whole = generate(model, tmp_path / "a.jsonl", sampling=GREEDY)
    # What the third token of the first trace was now ends every trace.
    end = whole[0]["input_ids"][len(PROMPTS[0]) + 2]
    model.generation_config.eos_token_id = [end]
    for cut, record in zip(
        generate(model, tmp_path / "b.jsonl", sampling=GREEDY), whole, strict=True
    ):
        prompt = record["prompt_tokens"]
        said = record["input_ids"][prompt:]
        expected = said[: said.index(end) + 1] if end in said else said
        assert cut["input_ids"] == record["input_ids"][:prompt] + expected


def test_traces_are_data(tmp_path: Path) -> None:
    model = build("llama")
    found = generate(model, tmp_path / "a.jsonl")
    documents = open_documents(tmp_path / "a.jsonl", None, model)
    assert [x.tolist() for x in documents] == [x["input_ids"] for x in found]
    assert found[0]["text"] == TOKENIZER.decode(found[0]["input_ids"])


@pytest.mark.parametrize(
    ("batches", "torn"),
    [
        (0, ""),
        (1, ""),
        (2, ""),
        (1, '{"input_ids": [1, 2'),
        (2, '{"input_ids": ['),
        (1, "record\n"),
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    batches: int, torn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    whole = generate(model, tmp_path / "whole.jsonl")
    original = traces._continue

    def dies(*arguments: Any) -> Any:
        if arguments[3] == batches:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(traces, "_continue", dies)
        generate(model, tmp_path / "cut.jsonl")
    partial = tmp_path / "cut.jsonl.partial" / "traces.jsonl"
    if torn:
        # Killed while it wrote: a line without its end, or half of a batch.
        with partial.open("a") as file:
            file.write(torn)
    torch.manual_seed(99)
    assert generate(model, tmp_path / "cut.jsonl") == whole
    assert not (tmp_path / "cut.jsonl.partial").exists()


def test_a_run_that_died_before_its_renaming_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    whole = generate(model, tmp_path / "whole.jsonl")
    replace = traces.os.replace

    def dies(source: Any, target: Any) -> None:
        if Path(target).name == "cut.jsonl":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(traces.os, "replace", dies)
        generate(model, tmp_path / "cut.jsonl")
    assert generate(model, tmp_path / "cut.jsonl") == whole


def test_prompts_are_continued_in_turns_and_differently(tmp_path: Path) -> None:
    sampling = traces.Sampling(max_new_tokens=12, temperature=1.0, top_p=1.0, batch_size=2)
    found = generate(build("llama"), tmp_path / "a.jsonl", PROMPTS[:2], count=5, sampling=sampling)
    starts = [x["input_ids"][: x["prompt_tokens"]] for x in found]
    assert starts == [PROMPTS[i] for i in (0, 1, 0, 1, 0)]
    assert len({tuple(x["input_ids"]) for x in found}) == 5
    few = generate(build("llama"), tmp_path / "b.jsonl", count=1)
    assert len(few) == 1


def test_an_interrupted_run_with_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(traces, "_continue", dies)
        generate(build("llama"), tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"sampling.temperature \(there 1.0, now 0.0\)"):
        generate(build("llama"), tmp_path / "a.jsonl", sampling=GREEDY)
    with pytest.raises(ValueError, match="model.digest"):
        generate(build("llama", seed=1), tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[3], []]}, r"prompts\[1\] is empty"),
        ({"prompts": ["x", 5]}, r"prompts\[1\] is a int that is neither text, chat nor"),
        ({"prompts": [[3, 99]]}, "token id 99, but the model's embedding has 64 rows"),
        (
            {"prompts": [{"messages": [{"role": "user", "content": "x"}]}]},
            "has no chat_template",
        ),
        ({"prompts": [[3] * 251]}, "has 251 tokens; with max_new_tokens=6 .* 256 positions"),
        ({"prompts": "missing.jsonl"}, "missing.jsonl does not exist"),
        ({"count": 0}, "count=0 must be at least 1"),
        ({"output": "a.txt"}, "a.txt must be a .jsonl file"),
        ({"output": "there.jsonl"}, "there.jsonl exists already"),
        ({"output": "there.jsonl/a.jsonl"}, "is not a directory"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "there.jsonl").touch()
    arguments: dict[str, Any] = {"prompts": PROMPTS, "output": "a.jsonl"} | changes
    arguments["output"] = tmp_path / arguments["output"]
    with pytest.raises(ValueError, match=message):
        generate(build("llama"), **arguments)
    assert [x.name for x in tmp_path.iterdir()] == ["there.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_sampling_settings_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        traces.Sampling(**settings)
