# SPDX-License-Identifier: Apache-2.0
"""Packing loses nothing, mixes nothing, and is the same every time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelopt_dms.data import DataError
from modelopt_dms.data.mixing import Visits
from modelopt_dms.data.packing import pack, pack_and_split

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30)


def make_documents(lengths, seed=0):
    """Documents of distinct ids, so that every token can be found again."""
    ids = np.random.default_rng(seed).permutation(sum(lengths)).astype(np.int32)
    return np.split(ids, np.cumsum(lengths)[:-1])


def documents_in(samples):
    """Token lists of the documents in samples, found by position_ids restarting."""
    found = []
    for batch in zip(samples.input_ids, samples.position_ids, samples.tokens_ahead, strict=True):
        for token, position, ahead in zip(*(x.tolist() for x in batch), strict=True):
            if ahead < 0:
                continue
            if position == 0:
                found.append([])
            assert position == len(found[-1])
            found[-1].append(token)
            if ahead == 0:
                found[-1] = tuple(found[-1])
    return found


@given(LENGTHS, st.integers(4, 24))
def test_every_document_stays_whole_unless_it_is_longer_than_a_sample(lengths, length):
    documents = make_documents(lengths)
    samples = pack(documents, length)
    pieces = {
        tuple(doc[i : i + length].tolist()) for doc in documents for i in range(0, len(doc), length)
    }
    found = documents_in(samples)
    assert len(set(found)) == len(found)
    assert set(found) <= pieces
    # Nothing but the one sample that is less than half full is left out.
    assert sum(map(len, pieces - set(found))) * 2 < length


@given(LENGTHS, st.integers(4, 24))
def test_samples_are_full_to_the_half_and_best_fit_does_not_waste_more(lengths, length):
    samples = pack(make_documents(lengths), length)
    filled = (samples.tokens_ahead >= 0).sum(1)
    assert samples.input_ids.shape[1:] == (length,)
    if len(samples) > 2:
        assert (2 * filled >= length).all()


@given(LENGTHS, st.integers(4, 24))
def test_tokens_ahead_counts_to_the_end_of_the_document(lengths, length):
    samples = pack(make_documents(lengths), length)
    for positions, ahead in zip(samples.position_ids, samples.tokens_ahead, strict=True):
        starts = [i for i in range(length) if positions[i] == 0] + [length]
        for start, end in zip(starts, starts[1:], strict=False):
            expected = torch.arange(end - start - 1, -1, -1)
            assert (ahead[start:end] == -1).all() or torch.equal(ahead[start:end].long(), expected)


def split(lengths, **options):
    options = {"length": 16, "window": 3, "wanted": 1000, "seed": 0, **options}
    return pack_and_split(make_documents(lengths), **options)


def test_held_out_samples_are_a_few_others_and_the_same_every_time():
    first, again, other = split([9] * 100), split([9] * 100), split([9] * 100, seed=1)
    assert torch.equal(first.held_out.input_ids, again.held_out.input_ids)
    assert not torch.equal(first.held_out.input_ids, other.held_out.input_ids)
    assert len(first.held_out) == 5
    assert len(first.training) == 95
    trained, held = (set(documents_in(x)) for x in (first.training, first.held_out))
    assert not trained & held


def test_no_more_documents_are_read_than_training_needs():
    documents = iter(make_documents([16] * 1000))
    pack_and_split(documents, length=16, window=3, wanted=20, seed=0)
    assert len(list(documents)) == 1000 - 28


def test_digest_tells_contents_apart():
    assert split([9] * 50).training.digest() == split([9] * 50).training.digest()
    assert split([9] * 50).training.digest() != split([9] * 50, seed=1).training.digest()


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([0, 0], {}, "all 2 documents are empty"),
        ([5], {}, "too short: 1 documents with 5 tokens do not fill two samples of .*length=16"),
        ([16], {}, "too short: 1 documents with 16 tokens"),
        ([4] * 40, {}, r"longest document has 4 tokens, but .* after window \+ 1 = 4"),
    ],
)
def test_too_little_data_is_refused(lengths, options, message):
    with pytest.raises(DataError, match=message):
        split(lengths, **options)


def test_two_samples_are_enough():
    prepared = split([16, 16])
    assert (len(prepared.training), len(prepared.held_out)) == (1, 1)


def test_every_pass_visits_all_samples_in_an_order_of_its_own():
    samples = pack(make_documents([8] * 10), 8)
    visits = Visits(samples, 25, seed=3)
    order = [int(visits[i]["input_ids"][0]) for i in range(len(visits))]
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20])
    assert order[:10] != order[10:20]
    # Any visit can be asked for alone, as a resumed run does.
    assert int(Visits(samples, 25, seed=3)[17]["input_ids"][0]) == order[17]
