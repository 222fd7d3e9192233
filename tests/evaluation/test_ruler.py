# SPDX-License-Identifier: Apache-2.0
"""Prompts of RULER's families are as long as asked for, whole, repeatable, and judged as generation would be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from paths import EMBEDDED
from transformers import AutoModelForCausalLM, AutoTokenizer

from modelopt_dms.evaluation.prose import read_sentences, reference_sentences, split_sentences
from modelopt_dms.evaluation.ruler import FAMILIES, Family, make_prompts
from modelopt_dms.evaluation.score import score_task
from modelopt_dms.evaluation.tasks import Episode
from modelopt_dms.gates.gate import gates
from modelopt_dms.modeling.mode import apply_dms

MODEL = EMBEDDED
TEMPLATE = (
    "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
WINDOW = 16


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def whole(episode: Episode, answers: bool = True) -> list[int]:
    first, *rest = episode.questions
    ids = [*episode.context_ids, *first.prompt_ids]
    if answers:
        ids += first.answer_ids
        for question in rest:
            ids += question.prompt_ids + question.answer_ids
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [600, 1500])
def test_prompts_fill_their_length_but_for_less_than_a_sentence(
    tokenizer: Any, family: Family, length: int
) -> None:
    longest = max(
        len(tokenizer(x, add_special_tokens=False)["input_ids"]) for x in reference_sentences()
    )
    for episode in make_prompts(family, tokenizer, length, 3, seed=0):
        assert length - longest - 2 <= len(whole(episode, answers=False)) <= length


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_prompts_and_another_seed_others(
    tokenizer: Any, family: Family
) -> None:
    first, again, other = (make_prompts(family, tokenizer, 600, 2, seed) for seed in (0, 0, 1))
    assert first == again
    assert first[0] != first[1]
    assert first != other


def test_turns_are_the_tokens_of_one_text_and_facts_stand_in_the_context(tokenizer: Any) -> None:
    for family in FAMILIES:
        for episode in make_prompts(family, tokenizer, 600, 4, seed=3):
            context = tokenizer.decode(episode.context_ids)
            asked = whole(episode)[len(episode.context_ids) :]
            assert (
                tokenizer(tokenizer.decode(asked), add_special_tokens=False)["input_ids"] == asked
            )
            for question in episode.questions:
                assert tokenizer.decode(question.answer_ids).strip() in context
            number = tokenizer.decode(episode.questions[-1].answer_ids).strip()
            assert number.isdigit() and len(number) == 5
            questions = {"needle": {1}, "multikey": {1}, "multivalue": {2, 3, 4}, "tracking": {2}}
            assert len(episode.questions) in questions[family]
            numbers = context.count("special magic numbers for")
            assert numbers == {"needle": 1, "multikey": 4, "tracking": 0}.get(
                family, len(episode.questions)
            )


def test_a_chat_template_surrounds_context_and_question(tokenizer: Any) -> None:
    plain = make_prompts("needle", tokenizer, 600, 1, seed=0)[0]
    assert plain.context_ids[0] == tokenizer.bos_token_id
    chat = AutoTokenizer.from_pretrained(MODEL)
    chat.chat_template = TEMPLATE
    (episode,) = make_prompts("needle", chat, 600, 1, seed=0)
    assert chat.decode(episode.context_ids).startswith("<user>A special magic number is hidden")
    question = chat.decode(episode.questions[0].prompt_ids)
    assert question.startswith("\nWhat is the special magic number for")
    assert "mentioned in the provided text?</user><answer>The special magic number for" in question
    assert question.endswith("mentioned in the provided text is")


def test_a_haystack_may_be_any_text_and_is_repeated_where_it_is_short(
    tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "b.txt").write_text("The second sea is deep. Is it? Yes.\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("The first sea\nis wide.", encoding="utf-8")
    sentences = read_sentences(tmp_path)
    assert sentences == ("The first sea is wide.", "The second sea is deep.", "Is it?", "Yes.")
    assert read_sentences(tmp_path / "a.txt") == sentences[:1]
    (episode,) = make_prompts("needle", tokenizer, 400, 1, seed=0, haystack=sentences)
    assert tokenizer.decode(episode.context_ids).count("sea is wide.") > 3
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no text"):
        read_sentences(tmp_path / "empty.txt")


def test_the_reference_of_python_is_prose() -> None:
    sentences = reference_sentences()
    assert sum(map(len, sentences)) > 50_000
    assert all(split_sentences(x) == [x] and not set('"*[]{}=<>|') & set(x) for x in sentences)


def test_impossible_prompts_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no room for a multikey prompt of"):
        make_prompts("multikey", tokenizer, 64, 1, seed=0)
    wrong: Any = "haystack"
    with pytest.raises(ValueError, match="family is 'haystack', must be one of"):
        make_prompts(wrong, tokenizer, 600, 1, seed=0)


def test_answers_judged_on_the_cache_are_those_of_one_masked_forward(tokenizer: Any) -> None:
    model = apply_dms(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(),
        {"window": WINDOW, "scale": 1.0, "offset": 0.0},
    )
    generator = torch.Generator().manual_seed(1)
    for gate in gates(model):
        gate.weight.data = torch.randn(gate.weight.shape, generator=generator)
    hits = 0
    episodes = [x for family in FAMILIES for x in make_prompts(family, tokenizer, 400, 2, seed=5)]
    for number, episode in enumerate(episodes):
        # The model knows no such tasks: every other answer becomes what it would say, so that both verdicts occur.
        if number % 2:
            ids = torch.tensor([whole(episode, answers=False)])
            said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4,
                                  do_sample=False)[0, ids.shape[1] :].tolist()  # fmt: skip
            episode.questions[0].answer_ids[:] = said
        ids = torch.tensor([whole(episode)])
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits[0].argmax(-1).tolist()
        end, right = len(episode.context_ids), 0
        for question in episode.questions:
            start = end + len(question.prompt_ids)
            end = start + len(question.answer_ids)
            right += best[start - 1 : end - 1] == question.answer_ids
        for chunk in (512, 100):
            score = score_task(model, [episode], chunk=chunk)
            assert round(score.value * score.count) == right
        assert score.context.compression_ratio > 1.2
        hits += right
    assert hits >= len(episodes) // 2
