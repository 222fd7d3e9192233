# SPDX-License-Identifier: Apache-2.0
"""Ids, masks, nulls and files are read as they are meant, and what is damaged is refused by record and field."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modelopt_dms.data import DataError, documents
from modelopt_dms.data.documents import open_documents, tokenize_prompts
from modelopt_dms.data.files import read_files
from modelopt_dms.data.inputs import Formatted

WORDS = ["<s>", "the", "cat", "sat", "user", "assistant", ":", ";"]


@pytest.fixture
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} ; {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template)


def ids_of(data: Any, tokenizer: Any = None) -> list[list[int]]:
    return [x.tolist() for x in open_documents(data, tokenizer, None)]


def test_padding_that_a_mask_marks_is_not_read() -> None:
    rows = [
        {"input_ids": [2, 2, 5, 6], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [5, 6, 7, 2], "attention_mask": [1, 1, 1, 0]},
    ]
    expected = [[5, 6], [5, 6, 7]]
    assert ids_of(rows) == expected
    assert ids_of(Dataset.from_list(rows)) == expected
    tensors = [{k: torch.tensor(v) for k, v in row.items()} for row in rows]
    assert ids_of(tensors) == expected


def test_a_packed_row_is_its_documents() -> None:
    ids, expected = [5, 6, 7, 8, 9], [[5, 6], [7, 8, 9]]
    assert ids_of([{"input_ids": ids, "seq_lengths": [2, 3]}]) == expected
    assert ids_of([{"input_ids": ids, "position_ids": [0, 1, 0, 1, 2]}]) == expected
    padded = {"position_ids": [1, 1, 0, 1, 2], "attention_mask": [0, 0, 1, 1, 1]}
    assert ids_of([{"input_ids": ids, **padded}]) == [[7, 8, 9]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([3, 2**32 + 5], r"data\[0\] holds token id 4294967301; expected less than 2\*\*31"),
        ([3, 2**31], "holds token id 2147483648"),
        (np.array([3, 2**63], np.uint64), "holds token id 9223372036854775808"),
        ([3, 2**70], r"data\[0\]\[1\] is 1180591620717411303424; expected a token id"),
        ([3, None], r"data\[0\]\[1\] is None; expected a token id"),
        ([True, False], r"data\[0\]\[0\] is true; expected a token id"),
        ([3, 1, False], r"data\[0\]\[2\] is false; expected a token id"),
        ({"input_ids": [1, True]}, r"data\[0\]: input_ids\[1\] is true; expected a token id"),
        (np.array([True, False]), "neither text, chat nor token ids"),
        ([[3, 4]], "neither text, chat nor token ids"),
        ([[3, 4], [5]], "neither text, chat nor token ids"),
        ({"input_ids": ""}, "input_ids is a str"),
        ({"input_ids": [3, -4]}, r"data\[0\]: input_ids holds token id -4"),
        ({"input_ids": [3, 4], "attention_mask": [1]}, r"attention_mask must be 2 zeros and ones"),
        ({"input_ids": [3, 4], "attention_mask": [1, 2]}, "attention_mask must be 2 zeros and"),
        ({"input_ids": [3, 4, 5], "attention_mask": [1, 0, 1]}, r"attention_mask\[1\] is 0 betw"),
        ({"input_ids": [3, 4], "seq_lengths": [1, 2]}, "seq_lengths sum to 3, but there are 2"),
        ({"input_ids": [3, 4], "position_ids": [0, 3]}, r"position_ids\[1\] is 3 after 0"),
    ],
)
def test_ids_that_are_none_are_refused(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ids_of([row])


def test_a_null_is_the_same_as_no_column(tokenizer: Any) -> None:
    rows = [
        {"messages": None, "text": "the cat", "input_ids": None},
        {"messages": [{"role": "user", "content": "cat", "x": None}], "text": None},
    ]
    assert ids_of(rows, tokenizer) == [[1, 2], [4, 6, 2, 7]]
    assert ids_of(Dataset.from_list(rows), tokenizer) == [[1, 2], [4, 6, 2, 7]]
    with pytest.raises(DataError, match=r"data\[0\] has nothing but null in messages, text"):
        ids_of([{"messages": None, "text": None}], tokenizer)


def test_a_mark_of_byte_order_is_no_text(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "the cat"}\r\n{"text": "sat"}\r\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe cat")
    assert ids_of(tmp_path / "a.jsonl", tokenizer) == [[1, 2], [3]]
    assert ids_of(tmp_path / "a.txt", tokenizer) == [[1, 2]]


def test_half_a_character_is_refused_by_record(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the"}\n{"text": "cut \\ud83d"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: text holds half a?.*\\ud83d at 4"):
        ids_of(tmp_path / "a.jsonl", tokenizer)
    with pytest.raises(DataError, match=r"data\[1\] holds half of a character"):
        ids_of(["the", "cut \ud83d"], tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "a.jsonl:2 is nested too deeply"),
        ('{"text": "a", "text": "b"}', "a.jsonl:2 has the key 'text' twice"),
        ('{"input_ids": [' + "1" * 5000 + "]}", "a.jsonl:2 is not JSON: .*4300 digits"),
        ("\0\0\0", "a.jsonl:2 is not JSON"),
        ('{"messages": ' + "[" * 500 + "]" * 500 + "}", "a.jsonl:2: messages.* is nested deeper"),
    ],
)
def test_damaged_lines_are_refused(line: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        ids_of(tmp_path / "a.jsonl", tokenizer)


def test_compressed_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "the"}'))
    with pytest.raises(DataError, match=r"a.jsonl is compressed by gzip"):
        ids_of(tmp_path / "a.jsonl")


def test_a_long_text_is_tokenized_in_parts_that_end_with_lines(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LONGEST", 20)
    text = "the cat sat\n" * 4 + "cat " * 6 + "x" * 41
    found = ids_of([text], tokenizer)
    assert [y for x in found for y in x][:18] == [1, 2, 3] * 4 + [2] * 6
    assert len(found) > 4 and found[0] == [1, 2, 3]
    read = open_documents([text], tokenizer, None)
    assert next(iter(read)).tolist() == found[0]


SHAREGPT = {
    "conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}],
    "system": None,
}
ALPACA = {"instruction": "the cat", "input": "", "output": "sat"}
PAIR = {"prompt": [{"role": "user", "content": "the cat"}]}
PAIR["completion"] = [{"role": "assistant", "content": "sat"}]
CHAT = [4, 6, 1, 2, 7, 5, 6, 3, 7]


@pytest.mark.parametrize(
    ("name", "row"), [("sharegpt", SHAREGPT), ("alpaca", ALPACA), ("prompt-completion", PAIR)]
)
def test_records_of_other_formats_are_read_when_named_and_else_the_name_is_said(
    name: str, row: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for data in ([row], path, Dataset.from_list([row])):
        assert ids_of(Formatted(data, name), tokenizer) == [CHAT]
        with pytest.raises(DataError, match=f"or say that it is {name}: --format {name}"):
            ids_of(data, tokenizer)
    assert tokenize_prompts(Formatted([row], name), tokenizer, None)[0].tolist() == CHAT[:5]


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": "q", "response": "a"}, "{prompt: .prompt, completion: .response}"),
        ({"instruction": "q", "context": "", "response": "a"}, "{prompt: .instruction, completion"),
        ({"conversation": []}, "{messages: .conversation}"),
        ({"content": "a"}, "{text: .content}"),
        ({"messages": [{"from": "human", "value": "q"}]}, "{conversations: .messages}"),
    ],
)
def test_records_of_unknown_columns_are_refused_with_what_converts_them(
    row: Any, hint: str
) -> None:
    with pytest.raises(DataError, match=re.escape(f"`jq -c '{hint}")):
        ids_of([row])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "the"}'.encode("utf-16"), "a.jsonl is UTF-16; `iconv"),
        ("a.txt", "the".encode("utf-16"), "a.txt is UTF-16; `iconv"),
        ("a.jsonl", b'[{"text": "the"}]', "a.jsonl:1 holds a list of records; `jq -c '.\[\]'"),
        ("a.json", b'[{"text": "the"}]', "a.json is not JSON lines; `jq -c '.\[\]'"),
    ],
)
def test_files_of_another_kind_are_refused_with_what_converts_them(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_files([tmp_path / name])


def test_formats_keep_systems_inputs_and_calls(tokenizer: Any) -> None:
    tokenizer.chat_template += (
        "{% for m in messages %}{{ m.tool_calls[0].function.name if m.tool_calls }}{% endfor %}"
    )
    call = {"from": "function_call", "value": '{"name": "mat", "arguments": {}}'}
    rows = Formatted(
        [{"conversations": [*SHAREGPT["conversations"], call], "system": "the"}], "sharegpt"
    )
    (ids,) = ids_of(rows, tokenizer)
    assert ids[:4] == [0, 6, 1, 7] and ids[4:13] == CHAT
    (ids,) = ids_of(Formatted([ALPACA | {"input": "sat"}], "alpaca"), tokenizer)
    assert ids == [4, 6, 1, 2, 3, 7, 5, 6, 3, 7]
    texts = Formatted([{"prompt": "the ", "completion": "cat"}], "prompt-completion")
    assert ids_of(texts, tokenizer) == [[1, 2]]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("chatml", ALPACA, "format='chatml' is unknown; expected one of sharegpt, alpaca"),
        ("sharegpt", ALPACA, "has columns instruction, input, output; format=sharegpt expects"),
        ("sharegpt", {"conversations": [{"from": "x", "value": "y"}]}, r"\[0\].from is 'x'"),
        ("alpaca", ALPACA | {"output": 3}, "output is a int"),
        ("prompt-completion", {"prompt": "a", "completion": []}, "must be two texts or two lists"),
    ],
)
def test_records_that_are_not_of_the_format_are_refused(
    name: str, row: Any, message: str, tokenizer: Any
) -> None:
    with pytest.raises(DataError, match=message):
        ids_of(Formatted([row], name), tokenizer)


def test_of_several_damaged_records_the_first_is_named(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "the cat sat"}] * 40
    path = tmp_path / "data.jsonl"
    for bad in ({"input_ids": [99]}, {"messages": [{"role": "user"}]}):
        rows[3] = rows[21] = rows[39] = bad
        path.write_text("\n".join(map(json.dumps, rows)))
        opened = open_documents(path, tokenizer, None)
        for seed in range(5):
            with pytest.raises(DataError, match=r"data\.jsonl:4\b"):
                list(opened.shuffled(seed))


def test_without_a_model_no_id_is_beyond_the_tokenizer(tokenizer: Any) -> None:
    assert ids_of([[0, len(WORDS) - 1]], tokenizer) == [[0, len(WORDS) - 1]]
    with pytest.raises(DataError, match=f"holds token id 8, but the tokenizer has {len(WORDS)} "):
        ids_of([[0, len(WORDS)]], tokenizer)
