# SPDX-License-Identifier: Apache-2.0
"""Whatever a chat template does with thoughts, training sees each of them where the model wrote it."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from modelopt_dms.data import DataError
from modelopt_dms.data.chat import render_chat, render_question
from modelopt_dms.data.records import Chat, read_record

# Small templates that treat thoughts as the real ones do.
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Like Qwen3's: a thought is a field or in the content; only those after the last question stay.
AFTER_LAST_QUESTION = """
{%- set n = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
    {%- set content = m.content or '' -%}
    {%- set thought = m.reasoning_content or '' -%}
    {%- if not thought and '</think>' in content -%}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<' + m.role + '>' -}}
    {%- if m.role == 'assistant' and loop.index0 > n.last and (loop.last or thought) -%}
        {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- content + '<end>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif -%}
"""
# Like DeepSeek-R1's: every answer is cut at </think>, and the template opens the next thought itself.
NEVER = """
{%- for m in messages -%}
    {%- set content = m.content or '' -%}
    {%- if m.role == 'assistant' and '</think>' in content -%}
        {%- set content = content.split('</think>')[-1] -%}
    {%- endif -%}
    {{- '<' + m.role + '>' + content -}}
    {%- if m.role == 'assistant' %}{{ '<end>' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<assistant><think>\\n' }}{% endif -%}
"""


# Like DeepSeek-V3.1's: the same, but unless told to think, an answer begins where a thought has ended already.
ON_REQUEST = NEVER.replace(
    "'<assistant><think>\\n'", "'<assistant>' + ('<think>' if thinking else '</think>')"
)


def tokenizer_with(template: str) -> Any:
    words = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template)


def chat_of(messages: Any, **columns: Any) -> Chat:
    found = read_record({"messages": messages, **columns}, "chat")
    assert isinstance(found, Chat)
    return found


def texts_of(messages: Any, template: str, label: str = "chat", **columns: Any) -> list[str]:
    return render_chat(chat_of(messages, **columns), tokenizer_with(template), label)


def ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def inline(thought: str, text: str) -> dict[str, str]:
    return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{text}"}


def field(thought: str, text: str, name: str = "reasoning_content") -> dict[str, str]:
    return {"role": "assistant", "content": text, name: thought}


TWO_TURNS = [ask("Q1"), inline("T1", "A1"), ask("Q2"), inline("T2", "A2")]


def test_a_template_that_keeps_thoughts_gives_one_text() -> None:
    (text,) = texts_of(TWO_TURNS, PLAIN)
    assert text.count("<user>") == 2 and "T1" in text and "T2" in text


@pytest.mark.parametrize("turn", [inline, field])
def test_thoughts_dropped_from_history_are_seen_where_they_were_written(turn: Any) -> None:
    chat = [ask("Q1"), turn("T1", "A1"), ask("Q2"), turn("T2", "A2")]
    assert texts_of(chat, AFTER_LAST_QUESTION) == [
        "<user>Q1<end><assistant><think>\nT1\n</think>\n\nA1<end>",
        "<user>Q1<end><assistant>A1<end><user>Q2<end><assistant><think>\nT2\n</think>\n\nA2<end>",
    ]


@pytest.mark.parametrize("turn", [inline, field])
def test_a_template_that_drops_every_thought_gives_what_the_model_wrote(turn: Any) -> None:
    chat = [ask("Q1"), turn("T1", "A1"), ask("Q2"), turn("T2", "A2")]
    first, second = texts_of(chat, NEVER)
    assert first == "<user>Q1<assistant><think>\nT1\n</think>\n\nA1<end>"
    assert second.startswith("<user>Q1<assistant>") and "T1" not in second
    assert second.endswith("A1<end><user>Q2<assistant><think>\nT2\n</think>\n\nA2<end>")


def test_a_turn_without_a_thought_after_the_last_thought_is_seen_too() -> None:
    chat = [*TWO_TURNS[:2], ask("Q2"), {"role": "assistant", "content": "A2"}]
    texts = texts_of(chat, NEVER)
    assert len(texts) == 2
    assert "T1" in texts[0] and texts[1].endswith("<user>Q2<assistant>A2<end>")


def test_a_template_that_can_think_is_told_to() -> None:
    (text,) = texts_of([ask("Q"), field("T", "A")], ON_REQUEST)
    assert text == "<user>Q<assistant><think>\nT\n</think>\n\nA<end>"


def test_answers_that_begin_inside_a_thought_and_other_fields_are_understood() -> None:
    """As generated after a prompt that ends in <think>; and gpt-oss's name of the field."""
    expected = ["<user>Q<assistant><think>\nT\n</think>\n\nA<end>"]
    for turn in ({"role": "assistant", "content": "T\n</think>\n\nA"}, field("T", "A", "thinking")):
        assert texts_of([ask("Q"), turn], NEVER) == expected


def test_chats_without_thoughts_go_through_the_template_as_they_are() -> None:
    chat = [ask("Q"), {"role": "assistant", "content": "A"}]
    assert texts_of(chat, NEVER) == ["<user>Q<assistant>A<end>"]


@given(
    st.lists(st.sampled_from(["none", "inline", "field"]), min_size=1, max_size=5),
    st.sampled_from([PLAIN.replace("m.content", "(m.reasoning_content or '') + m.content")])
    | st.sampled_from([AFTER_LAST_QUESTION, NEVER]),
)
def test_every_thought_and_every_answer_is_seen_and_none_twice(
    kinds: list[str], template: str
) -> None:
    def messages() -> Iterator[dict[str, str]]:
        for i, kind in enumerate(kinds):
            yield ask(f"why Q{i}")
            answer = f"A{i}"
            yield {
                "none": {"role": "assistant", "content": answer},
                "inline": inline(f"why T{i}", answer),
                "field": field(f"why T{i}", answer),
            }[kind]

    texts = texts_of(list(messages()), template)
    for i, kind in enumerate(kinds):
        assert sum(f"T{i}" in text for text in texts) == (kind != "none")
        assert any(f"A{i}" in text for text in texts)


def test_a_word_of_the_question_does_not_pass_for_the_thought() -> None:
    for thought in ("4", "think"):
        chat = [ask(thought), inline(thought, "four")]
        (text,) = texts_of(chat, NEVER)
        assert f"<think>\n{thought}\n</think>" in text
        kept = f"<think>\n{thought}\n</think>\n\nfour<end>"
        (text,) = texts_of(chat, AFTER_LAST_QUESTION)
        assert text == f"<user>{thought}<end><assistant>{kept}"


def test_a_question_ends_where_the_answer_begins() -> None:
    tokenizer = tokenizer_with(NEVER)
    assert render_question(chat_of([ask("Q")]), tokenizer, "chat") == "<user>Q<assistant><think>\n"
    asked = render_question(chat_of(TWO_TURNS), tokenizer, "chat")
    assert asked.endswith("<user>Q2<assistant><think>\n")
    with pytest.raises(DataError, match="chat: messages hold nothing that could be answered"):
        render_question(chat_of([inline("T", "A")]), tokenizer, "chat")


def test_what_cannot_be_kept_is_said() -> None:
    silent = "{# </think> #}{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}"
    with pytest.raises(
        DataError, match=r"notes:3: .*chat_template drops the thinking of messages\[1"
    ):
        texts_of([ask("Q"), inline("T", "")], silent, "notes:3")
    with pytest.raises(
        DataError, match=r"drops the thinking of messages\[1\] and knows no </think>"
    ):
        texts_of([ask("Q"), field("T", "A", "thinking")], PLAIN, "notes:3")
    called = {**inline("T", "A"), "tool_calls": [{"name": "search"}]}
    calling = NEVER.replace(
        "+ content -", "+ content + (m.tool_calls[0].name if m.tool_calls else '') -"
    )
    assert calling != NEVER
    with pytest.raises(DataError, match="drops the thinking"):
        texts_of([ask("Q"), called], calling, "notes:3")
    with pytest.raises(DataError, match="notes:3: the tokenizer's chat_template refuses it"):
        texts_of([ask("Q")], "{{ messages[5].content.x }}", "notes:3")
