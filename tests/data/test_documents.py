# SPDX-License-Identifier: Apache-2.0
"""Every accepted kind of data gives the same documents; everything else one clear error."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import modelopt_dms.data as documents_room
from modelopt_dms.data import DataError
from modelopt_dms.data.documents import open_documents

WORDS = ["<s>", "the", "cat", "sat", "on", "mat", "user", "assistant", ":"]
TEXTS = ["the cat sat", "on the mat", "the mat"]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": "sat"},
        ]
    },
    {"messages": [{"role": "user", "content": "on the mat"}]},
]


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template)


@pytest.fixture
def model():
    embedding = nn.Embedding(len(WORDS) + 3, 2)
    return SimpleNamespace(get_input_embeddings=lambda: embedding)


def ids_of(data, tokenizer, model):
    return [ids.tolist() for ids in open_documents(data, tokenizer, model)]


def test_texts_from_lists_datasets_and_files_are_the_same_documents(tokenizer, model, tmp_path):
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert expected[0] == [1, 2, 3]
    records = [{"text": text} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    pq.write_table(pa.table({"id": [1, 2, 3], "text": TEXTS}), tmp_path / "a.parquet")
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    for data in (
        TEXTS,
        records,
        Dataset.from_list(records),
        Dataset.from_dict({"input_ids": expected}),
        expected,
        [np.array(ids) for ids in expected],
        tmp_path / "a.jsonl",
        str(tmp_path / "a.jsonl"),
        [tmp_path / "a.parquet"],
        [str(tmp_path / f"{i}.txt") for i in range(3)],
    ):
        assert ids_of(data, tokenizer, model) == expected


def test_chats_go_through_the_template_once(tokenizer, model, tmp_path):
    expected = [[6, 8, 1, 2, 7, 8, 3], [6, 8, 4, 1, 5]]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    for data in (CHATS, Dataset.from_list(CHATS), tmp_path / "chat.jsonl"):
        assert ids_of(data, tokenizer, model) == expected


def test_a_chat_whose_template_drops_thoughts_is_several_documents(tokenizer, model):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content.split('</think>')[-1] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    (question, answer), thought = CHATS[0]["messages"], {"reasoning_content": "the mat"}
    chat = {"messages": [question, answer | thought] * 2}
    documents = open_documents([chat, "on"], tokenizer, model)
    first, second, third = ([WORDS[i] for i in ids] for ids in documents)
    assert len(documents) == 2 and third == ["on"]
    assert len(second) > len(first) and first[-1] == second[-1] == "sat"
    assert [x.count("mat") for x in (first, second)] == [1, 1]


def test_the_most_finished_column_is_used(tokenizer, model):
    assert ids_of([{"text": "mat", "input_ids": [1, 2]}], tokenizer, model) == [[1, 2]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "data is missing; expected a datasets.Dataset"),
        ([], "data is empty"),
        (42, "data is a int; expected"),
        ({"text": "x"}, "data is a dict; expected"),
        ("the cat sat", "is not a .jsonl, .txt, .parquet file; from Python, texts may be a list"),
        ("missing.jsonl", "missing.jsonl does not exist"),
        ([{"body": "x"}], r"data\[0\] has columns body; expected one of input_ids, messages, text"),
        (Dataset.from_dict({"body": ["x"]}), "the dataset has columns body; expected one of"),
        (DatasetDict(train=Dataset.from_dict({"text": ["x"]})), "one of its splits: train"),
        ([[1, 2], [3, 99]], r"data\[1\] holds token id 99, but the model's embedding has 12 rows"),
        ([[1, -2]], r"data\[0\] holds token id -2"),
        ([[0.5, 1.0]], r"data\[0\] is a list that is neither text, chat nor token ids"),
        ([b"abc"], r"data\[0\] is a bytes"),
        ([{"text": 3}], r"data\[0\]: text is a int"),
        ([{"messages": ["hi"]}], r"data\[0\]: messages must be a list of"),
    ],
)
def test_unusable_data_are_refused_at_the_door(data, message, tokenizer, model):
    with pytest.raises(DataError, match=message):
        ids_of(data, tokenizer, model)


def test_text_without_a_tokenizer_is_refused(model):
    with pytest.raises(DataError, match=r"data\[0\] is text, but there is no tokenizer"):
        ids_of(TEXTS, None, model)
    with pytest.raises(DataError, match=r"data\[0\] is a chat record, but there is no tokenizer"):
        ids_of(CHATS, None, model)
    ids_of([[1, 2, 3]], None, model)


def test_chat_without_a_template_is_refused(tokenizer, model):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat_template"):
        ids_of(CHATS, tokenizer, model)


def test_tokenizer_of_another_model_is_refused(tokenizer, model):
    small = SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(4, 2))
    with pytest.raises(DataError, match="tokenizer has 9 tokens, but the model's embedding has 4"):
        ids_of(TEXTS, tokenizer, small)


def test_an_added_token_beyond_the_embedding_is_refused_where_it_is_used(tokenizer, model):
    tokenizer.add_tokens(["one", "two", "three", "four"])
    assert ids_of(["the cat three"], tokenizer, model) == [[1, 2, 11]]
    with pytest.raises(
        DataError, match=r"data\[1\] holds token id 12, .* 12 rows; .* has 13 tokens"
    ):
        ids_of(["the cat", "four"], tokenizer, model)


def test_unreadable_lines_are_named(tokenizer, model, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "the cat"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl:3 is not JSON"):
        ids_of(path, tokenizer, model)
    path.write_text('{"text": "the cat"}\n{"body": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2 has columns body"):
        ids_of(path, tokenizer, model)


def test_damaged_files_are_named(tokenizer, model, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "b.txt").write_bytes(b"a\xff\xfe\xfa")
    for name in ("a.parquet", "b.txt"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            ids_of(tmp_path / name, tokenizer, model)


def test_the_package_hands_out_its_entry_and_no_other_name():
    assert documents_room.open_documents is open_documents
    with pytest.raises(AttributeError, match="has no attribute 'open_document'"):
        documents_room.open_document  # noqa: B018
