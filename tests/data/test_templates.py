# SPDX-License-Identifier: Apache-2.0
"""What a chat says is in its text, in whatever shape the template reads it; or the record and the field are named."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from modelopt_dms.data import DataError
from modelopt_dms.data.chat import render_chat, render_question
from modelopt_dms.data.documents import open_documents
from modelopt_dms.data.records import Chat
from modelopt_dms.data.records import read_record as read

# As real templates read contents: text only, text that is checked, parts only, or both.
CONCATENATES = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
STRINGS_ONLY = (
    "{% for m in messages %}{{ m.role }}:{{ m.content if m.content is string }};{% endfor %}"
)
PRINTS = "{% for m in messages %}{{ m.role }}:{{ m.content | trim }};{% endfor %}"
PARTS_ONLY = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}"
# As Llama 3's and DeepSeek's write calls: arguments are a mapping, or its JSON.
CALLS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}(ARGUMENTS){% endfor %};{% endfor %}"
)
MAPPINGS = CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
CALLS_JSON = CALLS.replace("ARGUMENTS", "{{ c.function.arguments }}")
TOOLS = (
    "{{ documents | tojson if documents }}{{ tools | tojson if tools }}{{ 'THINK' if enable_thinking }}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"

PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]


def tokenizer_with(template: Any) -> Any:
    """Every byte is a token, so that equal ids are equal texts."""
    words = {chr(i): i for i in range(256)}
    characters = Tokenizer(models.BPE(vocab=words, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=characters, chat_template=template)


def text_of(messages: Any, template: Any, **columns: Any) -> str:
    chat = read({"messages": messages, **columns}, "notes:3")
    assert isinstance(chat, Chat)
    (text,) = render_chat(chat, tokenizer_with(template), "notes:3")
    return text


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def called(arguments: Any, **fields: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call], **fields}


@pytest.mark.parametrize("template", [CONCATENATES, STRINGS_ONLY, PRINTS, PARTS_ONLY])
def test_a_content_in_parts_and_the_same_as_text_give_the_same(template: str) -> None:
    assert text_of([user(PARTS)], template) == "user:one two;"
    assert text_of([user("one two")], template) == "user:one two;"


@pytest.mark.parametrize("template", [MAPPINGS, CALLS_JSON])
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_arguments_are_written_as_json_once_whatever_their_shape(
    template: str, arguments: Any
) -> None:
    text = text_of([user("q"), called(arguments, content="")], template)
    assert text == 'user:q;assistant:f({"city": "Rome"});'


def test_a_call_without_a_content_is_read_by_a_template_that_needs_one() -> None:
    template = MAPPINGS.replace("{{ m.content }}", "{{ '' + m.content }}")
    assert text_of([user("q"), called({})], template) == "user:q;assistant:f({});"


def test_thoughts_among_the_parts_are_thoughts() -> None:
    template = (
        "{% for m in messages %}{{ '[' + m.reasoning_content + ']' if m.reasoning_content }}"
        "{{ m.content + ';' }}{% endfor %}"
    )
    parts = [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "four"}]
    said = text_of([user("q"), {"role": "assistant", "content": parts}], template)
    assert said == "q;[why]four;"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_is_read_in_every_field_of_transformers(name: str) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}{{ m.content }};{% endfor %}"
    said = text_of([user("q"), {"role": "assistant", "content": "a", name: "why"}], template)
    assert said == "q;whya;"


def test_a_thought_under_two_names_is_one_thought_and_two_thoughts_are_refused() -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}{{ m.content }};{% endfor %}"
    answer = {"role": "assistant", "content": "a", "reasoning_content": "why"}
    assert text_of([user("q"), {**answer, "reasoning": "why"}], template) == "q;whya;"
    with pytest.raises(DataError, match=r"notes:3: .* ignores messages\[1\].reasoning"):
        text_of([user("q"), {**answer, "reasoning": "because"}], template)


def test_columns_that_the_template_takes_reach_it() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    plain = text_of([user("q")], TOOLS, source="mine", score=3)
    assert plain == "q"
    for given in (tools, json.dumps(tools)):
        assert text_of([user("q")], TOOLS, tools=given) == json.dumps(tools) + "q"
    documents = [{"title": "a", "text": "b"}]
    assert text_of([user("q")], TOOLS, documents=documents) == json.dumps(documents) + "q"
    assert text_of([user("q")], TOOLS, enable_thinking=True) == "THINKq"
    assert text_of([user("q")], TOOLS, chat_template_kwargs={"enable_thinking": True}) == "THINKq"


def test_special_tokens_are_the_tokenizers_even_if_a_column_has_their_name() -> None:
    tokenizer = tokenizer_with("{{ bos_token }}{{ messages[0].content }}")
    tokenizer.bos_token = "a"
    chat = read({"messages": [user("q")], "bos_token": "b"}, "notes:3")
    assert isinstance(chat, Chat) and render_chat(chat, tokenizer, "notes:3") == ["aq"]


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        ({"messages": [user("q", cot="why")]}, PRINTS, r"ignores messages\[0\].cot"),
        (
            {"messages": [user("q"), called({"a": "b"}, content="")]},
            PRINTS,
            r"ignores messages\[1\].tool_calls\[0\]",
        ),
        (
            {"messages": [user("q"), called({"a": "b"}, content="said")]},
            MAPPINGS.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}"),
            r"ignores messages\[1\].content",
        ),
        (
            {"messages": [{"role": "critic", "content": "no"}, user("q")]},
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            r"ignores messages\[0\].content",
        ),
        ({"messages": [user("q")], "tools": [{"name": "f"}]}, PRINTS, "does not render tools"),
        ({"messages": [user("q")], "documents": [{"a": "b"}]}, PRINTS, "does not render documents"),
        ({"messages": [user("q")], "tools": "f"}, TOOLS, "tools is the string 'f'"),
        (
            {"messages": [user("q")], "chat_template_kwargs": {"effort": 1}},
            TOOLS,
            "chat_template_kwargs has effort, .* it takes documents, enable_thinking, tools",
        ),
        (
            {"messages": [user([{"type": "image_url", "image_url": "x"}])]},
            PARTS_ONLY,
            r"messages\[0\].content\[0\] is of type image_url; only text",
        ),
        ({"messages": [user(3)]}, PRINTS, r"messages\[0\].content is a int"),
        ({"messages": [user(None)]}, PRINTS, r"messages\[0\] has no content"),
        ({"messages": []}, PRINTS, "messages is empty"),
        (
            {"messages": [user("a\ud83d")]},
            PRINTS,
            r"messages\[0\].content holds half .* \\ud83d at 1",
        ),
        ({"messages": [user("q", when=datetime(2020, 1, 1))]}, PRINTS, r"\[0\].when is a datetime"),
    ],
)
def test_what_a_template_cannot_render_is_refused_by_record_and_field(
    record: Any, template: str, message: str
) -> None:
    with pytest.raises(DataError, match=f"notes:3.*{message}"):
        text_of(template=template, **record)


def test_a_command_that_a_template_obeys_is_not_lost() -> None:
    template = (
        "{% for m in messages %}{{ 'quiet' if m.content == '/quiet' else m.content }}{% endfor %}"
    )
    assert text_of([user("/quiet"), user("q")], template) == "quietq"


def test_a_question_is_checked_as_a_chat_is() -> None:
    chat = read({"messages": [user("q", cot="why")]}, "notes:3")
    assert isinstance(chat, Chat)
    with pytest.raises(DataError, match=r"notes:3: .* ignores messages\[0\].cot"):
        render_question(chat, tokenizer_with(PRINTS), "notes:3")


def test_a_template_that_prints_the_date_gives_the_same_every_day(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Tomorrow":
            return cls(2031, 12, 24)

    today = text_of([user("q")], DATED)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    tomorrow = tokenizer_with(DATED).apply_chat_template([user("q")], tokenize=False)
    assert tomorrow == "24 Dec 2031q"
    assert text_of([user("q")], DATED) == today == "01 Jan 2025q"


def test_jsonl_parquet_and_datasets_of_the_same_rows_are_the_same_tokens(tmp_path: Path) -> None:
    """Arrow gives every row the keys of all rows."""
    tool = {"name": "f", "parameters": {"city": {"type": "string"}}}
    # pyarrow takes the columns of a table from its first row.
    first_row = {"messages": [user("q"), called({"city": "Rome"}, content="")], "tools": [tool]}
    rows = [
        {**first_row, "enable_thinking": None},
        {"messages": [user("q"), called({"day": 3}, content=""), user("r")], "tools": None},
        {"messages": [user("q"), {"role": "assistant", "content": "a"}], "enable_thinking": True},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps(x) for x in pa.Table.from_pylist(rows).to_pylist())
    )
    template = "{{ tools | tojson if tools }}{{ enable_thinking }}" + MAPPINGS
    tokenizer = tokenizer_with(template)
    first, *others = (
        [x.tolist() for x in open_documents(data, tokenizer, None)]
        for data in (
            rows,
            tmp_path / "a.jsonl",
            tmp_path / "a.parquet",
            tmp_path / "b.jsonl",
            Dataset.from_list(rows),
        )
    )
    texts = ["".join(map(chr, ids)) for ids in first]
    assert texts[0] == json.dumps([tool]) + 'user:q;assistant:f({"city": "Rome"});'
    assert texts[1] == 'user:q;assistant:f({"day": 3});user:r;'
    assert all(x == first for x in others)
