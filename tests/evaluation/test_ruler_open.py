# SPDX-License-Identifier: Apache-2.0
"""RULER's open families and conversations: as long as asked for, with one right answer, and judged by generation."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from paths import EMBEDDED
from transformers import AutoModelForCausalLM, AutoTokenizer

from modelopt_dms.evaluation.conversations import make_conversations
from modelopt_dms.evaluation.measure import measure
from modelopt_dms.evaluation.names import CHATS, RULER_OPEN
from modelopt_dms.evaluation.ruler_open import OpenPrompt, make_open_prompts
from modelopt_dms.evaluation.score import score_open
from modelopt_dms.gates.gate import gates
from modelopt_dms.modeling.mode import apply_dms

LENGTH = 1400
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> dict[str, tuple[OpenPrompt, str, str]]:
    """A prompt of every family, its context and its question as text."""
    found = {}
    for family in RULER_OPEN:
        (x,) = make_open_prompts(family, tokenizer, LENGTH, 1, seed=3)
        found[family] = (x, tokenizer.decode(x.context_ids), tokenizer.decode(x.prompt_ids))
    return found


@pytest.mark.parametrize("family", RULER_OPEN)
def test_prompts_fill_their_length_and_differ_by_seed(tokenizer: Any, family: str) -> None:
    first, again, other = (make_open_prompts(family, tokenizer, LENGTH, 2, seed) for seed in (0, 0, 1))  # fmt: skip
    assert first == again and first[0] != first[1] and first != other
    for x in first:
        # One more document of qa has up to three sentences of the haystack.
        assert LENGTH - 300 <= len(x.context_ids) + len(x.prompt_ids) <= LENGTH
    with pytest.raises(ValueError, match=f"length=64 has no room for a {family} prompt"):
        make_open_prompts(family, tokenizer, 64, 1, 0)


def test_a_chain_leads_from_its_number_to_all_variables_that_are_wanted(prompts: Any) -> None:
    x, context, question = prompts["vt"]
    number = re.findall(r"assigned the value (\d+)", question)[0]
    text = context.split("hidden in the following text.")[2]
    found = re.findall(rf"VAR (\w+) = {number}\.", text)
    for _ in range(4):
        found += re.findall(rf"VAR (\w+) = VAR {found[-1]}\.", text)
    assert tuple(found) == x.wanted and len(set(found)) == 5
    assert "they are:" in question and "they are:" in context  # the example has an answer


def test_common_words_are_those_that_stand_most_often(prompts: Any) -> None:
    x, context, _ = prompts["cwe"]
    listed = context.split("Memorize the ones that appear most often.")[2]
    counts = Counter(re.findall(r"\d+\. ?(\w+)", listed))
    assert {word for word, n in counts.items() if n == 6} == set(x.wanted)
    assert set(counts.values()) == {6, 1} and len(x.wanted) == 10


def test_frequent_words_are_the_three_behind_the_dots(prompts: Any) -> None:
    x, context, _ = prompts["fwe"]
    words = context.split("coded words.")[1].split()
    ranked = [word for word, _ in Counter(words).most_common(5)]
    assert ranked[0] == "...." and tuple(ranked[1:4]) == x.wanted
    counts = Counter(words)
    assert counts[ranked[3]] > counts[ranked[4]]


def test_needles_of_all_keys_are_wanted_in_their_order(prompts: Any) -> None:
    x, context, question = prompts["multiquery"]
    values = dict(re.findall(r"numbers for (\w+) is: (\d+)\.", context))
    asked = re.findall(r"numbers for (.*) mentioned in the provided text\?", question)[0]
    assert tuple(values[key] for key in re.findall(r"\b(?!and\b)\w+", asked)) == x.wanted


def test_documents_hold_the_answer_in_one_and_in_two_hops(prompts: Any) -> None:
    x, context, question = prompts["qa_1"]
    person = re.findall(r"What does (\w+ \w+) work as", question)[0]
    assert re.findall(rf"{person} works as a (\w+)", context) == [*x.wanted]
    x, context, question = prompts["qa_2"]
    person = re.findall(r"that (\w+ \w+) lives in", question)[0]
    (town,) = re.findall(rf"{person} works as a \w+ and lives in (\w+)", context)
    assert re.findall(rf"town of {town} lies on the river (\w+)", context) == [*x.wanted]


def test_the_share_of_wanted_words_counts_whatever_their_case() -> None:
    x = OpenPrompt("vt", [], [], ("ABCDE", "FGHIJ"), 5)
    assert [x.share(said) for said in ("abcde, fghij", "ABCDE", "")] == [1.0, 0.5, 0.0]


def test_open_answers_are_those_of_greedy_generate_on_the_evicting_model(tokenizer: Any) -> None:
    model = apply_dms(
        AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval(),
        {"window": 16, "scale": 1.0, "offset": 0.0},
    )
    generator = torch.Generator().manual_seed(1)
    for gate in gates(model):
        gate.weight.data = torch.randn(gate.weight.shape, generator=generator)
    (x,) = make_open_prompts("qa_1", tokenizer, 300, 1, seed=0)
    ids = torch.tensor([x.context_ids + x.prompt_ids])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)  # fmt: skip
    text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    first, last = text.split()[0], "never said"
    judged = OpenPrompt("qa_1", x.context_ids, x.prompt_ids, (first, last), 8)
    score = score_open(model, tokenizer, [judged])
    assert (score.value, score.count) == (0.5, 1)
    assert score.context.compression_ratio > 1.2
    assert score.end.context_tokens > ids.shape[1]


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_conversations_ask_for_what_was_told_first(kind: str, template: str | None) -> None:
    chat = AutoTokenizer.from_pretrained(EMBEDDED)
    chat.chat_template = template
    first, again, other = (make_conversations(kind, chat, 900, 2, seed) for seed in (0, 0, 1))
    assert first == again and first[0] != first[1] and first != other
    for x in first:
        context = chat.decode(x.context_ids)
        assert 800 <= len(x.context_ids) + len(x.questions[0].prompt_ids) <= 900
        assert len(x.questions) == {"system": 2, "turns": 4}[kind]
        told = context[: len(context) // 8] if kind == "system" else context
        for question in x.questions:
            prompt, answer = (chat.decode(y) for y in (question.prompt_ids, question.answer_ids))
            assert answer.strip() in told
            assert re.search(r"What is .*\?", prompt) and prompt.endswith(" is")
            if template is not None:
                assert "</user><assistant>" in prompt
        assert context.startswith("<system>") == (kind == "system" and template is not None)


def test_every_task_is_measured_by_its_name(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    for task in ("needle", "fwe", "system"):
        score = measure(model, tokenizer, task, 700, 1, 0)
        assert score.metric == "accuracy" and 0 <= score.value <= 1
        assert score.context.compression_ratio == 1.0
    with pytest.raises(ValueError, match="must be among recall, tracking"):
        measure(model, tokenizer, "nedle", 700, 1, 0)
