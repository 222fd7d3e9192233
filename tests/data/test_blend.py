# SPDX-License-Identifier: Apache-2.0
"""A blend keeps to its weights, is the same every time, and reads no more than it needs."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modelopt_dms.data import DataError
from modelopt_dms.data.inputs import Blend, parse_data
from modelopt_dms.data.mixing import open_sources, prepare_samples, read_once

LENGTH, WINDOW = 16, 3
ROWS = 1000
MODEL: Any = SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(ROWS, 1))

# For each source: the lengths of its documents, and its weight.
SOURCES = st.lists(
    st.tuples(st.lists(st.integers(6, 40), min_size=8, max_size=40), st.floats(0.05, 20.0)),
    min_size=1,
    max_size=4,
)


class Records(list):
    """Records that count how often they are read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)


def blend(described: list[tuple[list[int], float]]) -> Blend:
    """A blend in which each source has a token id of its own."""
    return Blend(
        [
            (Records(np.full(n, source) for n in lengths), weight)
            for source, (lengths, weight) in enumerate(described)
        ]
    )


def prepare(data: Any, wanted: int = 50, seed: int = 0) -> Any:
    sources = open_sources(data, None, MODEL)
    return prepare_samples(sources, length=LENGTH, window=WINDOW, wanted=wanted, seed=seed)


@given(SOURCES, st.integers(0, 3))
def test_after_any_number_of_visits_shares_are_within_a_sample_of_the_weights(
    described: Any, seed: int
) -> None:
    data = prepare(blend(described), seed=seed)
    total = sum(weight for _, weight in described)
    tokens = np.zeros(len(described))
    for visit in data.visits(50, seed):
        ids = visit["input_ids"][visit["tokens_ahead"] >= 0]
        assert len(ids.unique()) == 1
        tokens[int(ids[0])] += len(ids)
        for source, (_, weight) in enumerate(described):
            wanted = weight / total * tokens.sum()
            assert -LENGTH * len(described) <= tokens[source] - wanted <= LENGTH


@given(SOURCES, st.integers(0, 3))
def test_a_blend_is_a_function_of_its_seed_and_any_visit_can_be_asked_for_alone(
    described: Any, seed: int
) -> None:
    first, again = (prepare(blend(described), seed=seed) for _ in range(2))
    assert first.training.digest() == again.training.digest()
    assert torch.equal(first.held_out.input_ids, again.held_out.input_ids)
    # A longer run begins as a shorter one: what a resumed run relies on.
    longer, shorter = first.visits(60, seed), again.visits(40, seed)
    assert torch.equal(longer.order[:40], shorter.order)
    assert torch.equal(longer[37]["input_ids"], shorter[37]["input_ids"])


def test_no_more_records_are_read_than_the_shares_ask_for() -> None:
    data = blend([([LENGTH] * 1000, 3.0), ([LENGTH] * 1000, 1.0)])
    prepare(data, wanted=80)
    assert [source.reads for source, _ in data.parts] == [60 + 6, 20 + 2]


def test_a_source_that_runs_out_is_visited_again_and_never_held_out_and_trained_on() -> None:
    small = [np.arange(i, i + LENGTH) for i in range(10)]
    large = [np.arange(500 + i, 500 + i + LENGTH) for i in range(400)]
    data = prepare(Blend([(small, 0.5), (large, 0.5)]), wanted=100)
    starts = [int(x["input_ids"][0]) for x in data.visits(100, 0)]
    assert sum(x < 500 for x in starts) == 50
    assert len({x for x in starts if x < 500}) == 9
    assert len({x for x in starts if x >= 500}) == 50
    assert not set(starts) & set(data.held_out.input_ids[:, 0].tolist())
    assert {x < 500 for x in data.held_out.input_ids[:, 0].tolist()} == {True, False}


def test_data_that_are_no_blend_are_read_in_the_order_they_always_were() -> None:
    documents = [[i] * LENGTH for i in range(20)]
    (source,) = open_sources(documents, None, MODEL)
    order = [int(ids[0]) for ids in source.documents.shuffled(seed=7)]
    assert order == np.random.default_rng(7).permutation(20).tolist()


def test_read_once_takes_turns_until_a_source_ends_and_repeats_nothing() -> None:
    data = blend([([4] * 3, 1.0), ([4] * 9, 1.0)])
    read = [int(ids[0]) for ids in read_once(open_sources(data, None, MODEL), seed=0)]
    assert read == [0, 1] * 3 + [1] * 6


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], r"parts=\[\] must be a list of \(source, weight\)"),
        ("a.jsonl:1", "parts='a.jsonl:1' must be a list"),
        (["a.jsonl"], r"parts\[0\] is 'a.jsonl'; expected \(source, weight\)"),
        ([("a.jsonl", 0)], "a.jsonl has weight 0; expected a number above 0"),
        ([([[1]], -1.5)], r"parts\[0\] has weight -1.5"),
        ([([[1]], float("nan"))], r"parts\[0\] has weight nan"),
        ([([[1]], "3")], r"parts\[0\] has weight '3'"),
        ([(Blend([([[1]], 1)]), 1)], r"parts\[0\] is a Blend"),
    ],
)
def test_a_blend_that_says_nothing_clear_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Blend(parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([([[1] * 40], 1), ("missing.jsonl", 1)], "missing.jsonl does not exist"),
        ([([[1] * 40], 1), ("notes.csv", 1)], "notes.csv is not a .jsonl"),
        ([([[1] * 40], 1), ([], 1)], r"parts\[1\] is empty"),
        ([([[1] * 40] * 9, 1), ([[1], ["x"]], 1)], r"parts\[1\]\[1\] is a list that is neither"),
        (
            [([[1] * 40] * 9, 1), ([[1] * 9], 1)],
            r"parts\[1\]: data is too short: 1 documents with 9",
        ),
        ([([[1] * 40] * 9, 1), ([[1] * 3] * 99, 1)], r"parts\[1\]: nothing to learn"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(parts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(Blend(parts))


def test_the_command_line_writes_weights_behind_colons() -> None:
    def parsed(*arguments: str) -> Any:
        found = parse_data(arguments)
        if not isinstance(found, Blend):
            return [str(x) for x in found]
        return [
            ([str(x) for x in source] if isinstance(source, list) else str(source), weight)
            for source, weight in found.parts
        ]

    assert parsed("a.jsonl", "b:c.txt") == ["a.jsonl", "b:c.txt"]
    assert parsed("a.jsonl:7", "b:2.txt:3") == [("a.jsonl", 7), ("b:2.txt", 3)]
    assert parsed("a.jsonl:0.75", "b.txt", "c.txt") == [
        ("a.jsonl", 0.75),
        (["b.txt", "c.txt"], 0.25),
    ]
    for arguments, message in (
        (["a.jsonl:0"], "--data a.jsonl:0 has weight 0; expected a number above 0"),
        (["a.jsonl:-1"], "a.jsonl:-1 has weight -1"),
        (["a.jsonl:nan"], "a.jsonl:nan has weight nan"),
        (["a.jsonl:0.6", "b.txt:0.4", "c.txt"], "--data c.txt has no weight, and .* sum to 1;"),
    ):
        with pytest.raises(DataError, match=message):
            parse_data(arguments)
