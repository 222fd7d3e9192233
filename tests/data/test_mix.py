# SPDX-License-Identifier: Apache-2.0
"""The text that the package makes itself: deterministic, within lengths, with answers that stand far above."""

import re
import sysconfig
from collections import Counter
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import modelopt_dms as dms
from modelopt_dms.config.recipe import Recipe
from modelopt_dms.data import DataError
from modelopt_dms.data.installed_text import definitions, english, part_of, python_source
from modelopt_dms.data.mix import SHARES, Document, calibration_documents, calibration_mix
from modelopt_dms.data.mix.content import FOLDER
from modelopt_dms.data.mix.facts import PAIRS, PLAIN
from modelopt_dms.data.mix.writing import own_texts
from modelopt_dms.evaluation.text import source_files

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LENGTH = 1024


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Runs of up to five characters that a text has, or bytes: about as many tokens as a real one, and any text."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {x: i for i, x in enumerate(sorted(letters))}
    texts = [
        *list(english("calibration").values())[:40],
        *list(python_source("calibration").values())[:5],
    ]
    words = Counter(w[:5] for text in texts for x in text for w in re.findall(r"\w+|\W", x))
    merges: list[tuple[str, str]] = []
    for word, _ in words.most_common(3000):
        encoded = "Ġ" + word if word.isalpha() else word
        for i in range(1, len(encoded)):
            pair = (encoded[:i], encoded[i])
            if "".join(pair) not in vocabulary and all(x in vocabulary for x in pair):
                vocabulary["".join(pair)] = len(vocabulary)
                merges.append(pair)
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = token_decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def chats(tokenizer: Any) -> list[Document]:
    return list(calibration_documents(40, LENGTH, tokenizer, kinds={"chat": 1}))


def test_documents_hang_on_the_seed_alone(tokenizer: Any) -> None:
    first = calibration_mix(12, 300, tokenizer, seed=3)
    assert first == calibration_mix(12, 300, tokenizer, seed=3)
    assert first != calibration_mix(12, 300, tokenizer, seed=4)
    # Another count changes no document.
    assert calibration_mix(15, 300, tokenizer, seed=3)[:12] == first


@pytest.mark.parametrize("length", [32, 100, 256, 1024, 3000])
def test_documents_are_as_long_as_asked_and_no_longer(tokenizer: Any, length: int) -> None:
    sizes = [len(x) for x in calibration_mix(20, length, tokenizer)]
    assert max(sizes) <= length
    assert sum(sizes) > 0.8 * length * len(sizes)


def test_kinds_keep_their_shares_from_the_beginning(tokenizer: Any) -> None:
    kinds = [x.kind for x in calibration_documents(40, 128, tokenizer)]
    for count in (7, 20, 40):
        for kind, share in SHARES.items():
            assert abs(kinds[:count].count(kind) - share * count) <= 1


def test_unknown_kinds_and_tiny_lengths_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="poems"):
        calibration_mix(1, 100, tokenizer, kinds={"poems": 1})
    with pytest.raises(DataError, match="share"):
        calibration_mix(1, 100, tokenizer, kinds={"chat": 0})
    with pytest.raises(DataError, match="31"):
        calibration_mix(1, 31, tokenizer)


def test_every_answer_stands_in_the_text_before_its_question(chats: list[Document]) -> None:
    asked = 0
    for document in chats:
        for question in document.asked:
            before = document.text[: document.text.rindex(question.question)]
            for value in question.values:
                assert value in before
                asked += 1
    assert asked > 100


def test_most_questions_are_far_below_their_answers(tokenizer: Any, chats: list[Document]) -> None:
    distances = sorted(
        len(tokenizer(x.text[x.text.index(value) : x.text.rindex(q.question)])["input_ids"])
        for x in chats
        for q in x.asked
        for value in q.values
    )
    assert distances[len(distances) // 5] > 300
    assert distances[len(distances) // 2] < LENGTH * 0.9


def test_no_end_of_a_chat_is_cut(tokenizer: Any, chats: list[Document]) -> None:
    for document in chats:
        assert tokenizer.decode(document.ids) == document.text
        assert document.text.endswith("<|end|>\n")


def test_passages_come_back_word_for_word_after_other_text(tokenizer: Any) -> None:
    for document in calibration_documents(10, LENGTH, tokenizer, kinds={"repeat": 1}):
        (passage,) = document.asked[0].values
        assert document.text.count(passage) == 2
        between = document.text.split(passage)[1]
        assert len(tokenizer(between)["input_ids"]) > 64
        assert 50 < len(tokenizer(passage)["input_ids"]) <= 420


def test_a_tokenizer_without_a_chat_template_gets_plain_turns() -> None:
    (document,) = calibration_documents(1, 400, make_tokenizer(None), kinds={"chat": 1})
    assert "User: " in document.text and "Assistant: " in document.text


def test_nothing_is_like_the_needles_of_the_evaluation(chats: list[Document]) -> None:
    own = ("\n\n".join(x) for x in own_texts())
    content = [x.read_text(encoding="utf-8") for x in FOLDER.iterdir()]
    assert len(content) == 6
    for text in [*content, *own, *(x.text for x in chats)]:
        assert not re.search(r"magic|special number|\bVAR\b", text)


def test_chats_are_diverse(chats: list[Document]) -> None:
    questions = [q.question for x in chats for q in x.asked]
    beginnings = Counter(" ".join(x.split()[:4]) for x in questions)
    assert len(set(questions)) > 0.95 * len(questions)
    assert beginnings.most_common(1)[0][1] < 0.1 * len(questions)


def slots(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def test_questions_and_answers_of_templates_use_what_the_statement_says() -> None:
    for statement, questions in PLAIN:
        assert questions
        for question, value in questions:
            assert slots(question) <= slots(statement), question
            assert slots(value) <= slots(statement) and value in statement, value
    for statements, question, (answer, *values) in PAIRS:
        told = slots(" ".join(statements))
        assert slots(question) | slots(answer) <= told
        assert values and slots(" ".join(values)) <= slots(answer)


def test_what_is_evaluated_on_is_never_calibrated_on() -> None:
    mine, others = english("calibration"), english("evaluation")
    assert len(mine) > 50 and len(others) > 50
    assert not mine.keys() & others.keys()
    assert not any(x.startswith("topic:") for x in mine)
    assert not python_source("calibration").keys() & python_source("evaluation").keys()
    library = Path(sysconfig.get_paths()["stdlib"])
    held_out = {x.relative_to(library).as_posix() for x in source_files("held_out")}
    assert held_out and not held_out & python_source("calibration").keys()
    assert {part_of(x) for x in python_source("calibration")} == {"calibration"}


def test_definitions_joined_are_the_module() -> None:
    source = python_source("calibration")
    name = next(iter(source))
    assert Path(name).suffix == ".py"
    for text in list(source.values())[:20]:
        assert "".join(definitions(text)) == text


def test_compress_makes_its_own_data_where_there_is_a_tokenizer(tokenizer: Any) -> None:
    recipe = Recipe(
        dms={"target_cr": 2.0, "window": 4},
        calibrate={"samples": 4, "held_out": 2, "sample_length": 64},
    )
    own = dms.compress(build_for(tokenizer), recipe, tokenizer=tokenizer, progress=False)
    seed = recipe.calibrate.seed if recipe.calibrate is not None else 0
    given = calibration_mix(6, 64, tokenizer, seed)
    same = dms.compress(build_for(tokenizer), recipe, data=given, progress=False)
    for a, b in zip(own.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="data is missing"):
        dms.compress(build_for(tokenizer), recipe, progress=False)


def build_for(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()
