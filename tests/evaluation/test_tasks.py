# SPDX-License-Identifier: Apache-2.0
"""The synthetic tasks: what an episode promises, checked from its text alone."""

from __future__ import annotations

import json
import random
import sys

import pytest
from paths import ROOT
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modelopt_dms.evaluation import tasks
from modelopt_dms.evaluation.text import source_files, split_of
from modelopt_dms.evaluation.words import DIGITS, KEYS, MARKERS, VALUES

sys.path.insert(0, str(ROOT / "examples"))

import make_embedded_model  # noqa: E402 - examples/ is not a package


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """A small tokenizer trained as the embedded model's is."""
    return make_embedded_model.train_tokenizer(vocab_size=1024, lines=400)


def solve(context: str, prompt: str) -> str:
    """Answer a question by reading the context's `keep` lines, and nothing else."""
    facts = dict(line.split()[1:] for line in context.splitlines() if line.startswith("keep "))
    command, *keys = prompt.split()
    if command == "ask":
        return f" {facts[keys[0]]}\n"
    if command == "trace":
        answer, key = "", keys[0]
        while key in facts:
            key = facts[key]
            answer += f" {key}"
        return answer + "\n"
    total, steps = 0, []
    for number, key in enumerate(keys):
        total += int(facts[key])
        steps.append(f" {key} {facts[key]}" + (f" = {total}" if number else ""))
    return " +".join(steps) + "\n"


def without_lines(text: str, marker: str) -> str:
    return "".join(x for x in text.splitlines(True) if not x.startswith(f"{marker} "))


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("length", [128, 512, 1023])
def test_contexts_have_the_exact_length(tokenizer, task, length):
    for episode in tasks.make_episodes(task, tokenizer, length, 4, seed=1):
        assert len(episode.context_ids) == length
        assert 1 <= len(episode.questions) <= 8


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_same_seed_gives_the_same_episodes_and_another_seed_others(tokenizer, task):
    first = tasks.make_episodes(task, tokenizer, 256, 2, seed=1)
    assert first == tasks.make_episodes(task, tokenizer, 256, 2, seed=1)
    assert first != tasks.make_episodes(task, tokenizer, 256, 2, seed=2)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_answers_follow_from_the_facts_and_never_from_decoys(tokenizer, task):
    for episode in tasks.make_episodes(task, tokenizer, 512, 5, seed=3):
        context = tokenizer.decode(episode.context_ids[1:])  # without <bos>
        for question in episode.questions:
            prompt = tokenizer.decode(question.prompt_ids)
            answer = tokenizer.decode(question.answer_ids)
            assert solve(without_lines(context, "skip"), prompt) == answer


@pytest.mark.parametrize("task", tasks.TASKS)
def test_some_decoys_name_the_key_of_a_fact(tokenizer, task):
    shared = 0
    for episode in tasks.make_episodes(task, tokenizer, 512, 5, seed=3):
        lines = [line.split() for line in tokenizer.decode(episode.context_ids[1:]).splitlines()]
        keys = {line[1] for line in lines if line[:1] == ["keep"]}
        shared += sum(line[:1] == ["skip"] and line[1] in keys for line in lines)
    assert shared > 0


@pytest.mark.parametrize("task", tasks.TASKS)
def test_facts_are_a_small_part_of_the_context(tokenizer, task):
    for episode in tasks.make_episodes(task, tokenizer, 1024, 3, seed=4):
        text = tokenizer.decode(episode.context_ids[1:])
        others = without_lines(text, "keep")
        share = 1 - len(tokenizer(others)["input_ids"]) / len(tokenizer(text)["input_ids"])
        assert 0.05 < share < 0.12


@pytest.mark.parametrize("task", tasks.TASKS)
def test_most_questions_need_more_than_the_last_quarter_of_the_context(tokenizer, task):
    answered = total = 0
    for episode in tasks.make_episodes(task, tokenizer, 512, 20, seed=5):
        recent = tokenizer.decode(episode.context_ids[-128:])
        for question in episode.questions:
            total += 1
            try:
                guess = solve(recent, tokenizer.decode(question.prompt_ids))
            except (KeyError, ValueError):
                continue
            answered += guess == tokenizer.decode(question.answer_ids)
    assert answered / total < 0.4


@pytest.mark.parametrize("task", tasks.TASKS)
def test_no_fact_is_asked_for_twice(tokenizer, task):
    for episode in tasks.make_episodes(task, tokenizer, 2048, 3, seed=6):
        asked: list[str] = []
        for question in episode.questions:
            asked += tokenizer.decode(question.prompt_ids).split()[1:]
        assert len(episode.questions) == 8
        assert len(asked) == len(set(asked))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_pieces_encode_as_the_joined_text_does(tokenizer, task):
    for episode in tasks.make_episodes(task, tokenizer, 512, 3, seed=7):
        ids = list(episode.context_ids)
        for question in episode.questions:
            ids += question.prompt_ids + question.answer_ids
        assert ids[0] == tokenizer.bos_token_id
        joined = tokenizer.decode(ids[1:])
        assert tokenizer(joined)["input_ids"] == ids  # the tokenizer adds <bos> itself


def test_every_task_word_is_one_token(tokenizer):
    for word in KEYS + VALUES + DIGITS:
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word
    for marker in MARKERS:
        assert len(tokenizer(marker, add_special_tokens=False)["input_ids"]) == 1, marker


def test_training_documents_have_a_role_for_every_token(tokenizer):
    documents = list(tasks.training_documents(tokenizer, 12, 300, seed=0))
    assert documents == list(tasks.training_documents(tokenizer, 12, 300, seed=0))
    for document in documents:
        assert len(document.ids) == len(document.roles) == 300
    roles = {role for document in documents for role in document.roles}
    assert roles == {"text", "record", "prompt", "answer"}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_training_questions_are_answered_by_the_facts_before_them(tokenizer, task):
    document = tasks._task_document(task, tokenizer, 600, 0.2, random.Random(1))
    lines = tokenizer.decode(document.ids[1:]).splitlines(True)  # without <bos>
    checked = 0
    for number, line in enumerate(lines):
        words = line.split()
        if words[:1] in (["ask"], ["trace"], ["add"]) and not line.startswith(" "):
            prompt = " ".join(words[: {"ask": 2, "trace": 2, "add": 4}[words[0]]])
            assert prompt + solve("".join(lines[:number]), prompt) == line
            checked += 1
    assert checked > 5


def test_no_file_is_both_trained_on_and_held_out():
    train, held_out = set(source_files("train")), set(source_files("held_out"))
    assert train and held_out and not train & held_out
    assert split_of("json/decoder.py") == split_of("json/decoder.py")


def test_held_out_text_comes_from_held_out_files(tokenizer):
    lines = set()
    for path in source_files("held_out"):
        text = path.read_text(encoding="utf-8", errors="ignore").expandtabs(4)
        lines |= {line.rstrip() for line in text.split("\n")}
    for ids in tasks.held_out_text(tokenizer, 300, 3, seed=0):
        assert len(ids) == 300
        decoded = tokenizer.decode(ids[1:]).split("\n")
        assert set(decoded[:-1]) <= lines  # the last line may be cut


def test_source_lines_never_look_like_records(tokenizer):
    for ids in tasks._lines_up_to(tokenizer, 60_000, "train", random.Random(0)):
        assert tokenizer.decode(ids).split(" ")[0] not in MARKERS


def test_unknown_task_and_too_short_context_are_refused(tokenizer):
    with pytest.raises(ValueError, match="must be one of"):
        tasks.make_episodes("sorting", tokenizer, 512, 1, seed=0)
    with pytest.raises(ValueError, match="at least 64"):
        tasks.make_episodes("recall", tokenizer, 32, 1, seed=0)


def test_the_training_script_writes_a_model_that_loads(tmp_path):
    output = tmp_path / "model"
    make_embedded_model.main(["--smoke", "--output", str(output)])
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("ask fox")["input_ids"][0] == tokenizer.bos_token_id
    assert json.loads((output / "training_log.json").read_text())["steps"] == 4
    assert (output / "model.safetensors").stat().st_size < 2**22
    assert "recall" in (output / "README.md").read_text()
