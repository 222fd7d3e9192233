# SPDX-License-Identifier: Apache-2.0
"""Pages of an engine's lists, given out on the host."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modelopt_dms.engine.pages import PageTables
from modelopt_dms.ops.paged import NO_PAGE, PAGE, OutOfPagesError


class Tables(RuleBasedStateMachine):
    """Lists that grow as on a device: by at most one a token, and nobody but the device knows by how much."""

    @initialize(
        layers=st.integers(1, 3),
        batch=st.integers(1, 4),
        heads=st.integers(1, 3),
        width=st.integers(1, 4),
        spare=st.integers(0, 15),
        seed=st.integers(0, 999),
    )
    def start(self, layers: int, batch: int, heads: int, width: int, spare: int, seed: int) -> None:
        self.tables = PageTables(layers, batch, heads, width, heads + spare)
        self.live = np.zeros((layers, batch, heads), np.int32)
        self.random = np.random.default_rng(seed)
        self.capacity = width * PAGE

    def _rows(self, data: st.DataObject) -> list[int]:
        batch = self.live.shape[1]
        return data.draw(st.lists(st.integers(0, batch - 1), min_size=1, unique=True), "rows")

    @rule(data=st.data(), tokens=st.sampled_from([1, 1, 7, 64, 100]))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        rows = self._rows(data)
        before = self.tables.table.copy()
        try:
            changed = self.tables.reserve(rows, tokens)
        except OutOfPagesError:
            assert np.array_equal(self.tables.table, before)
            return
        assert changed == (not np.array_equal(self.tables.table, before))
        assert self.tables.covers(rows, tokens)
        self.tables.advance(rows, tokens)
        grown = self.random.integers(0, tokens + 1, self.live[:, rows].shape)
        self.live[:, rows] = np.minimum(self.live[:, rows] + grown, self.capacity)

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        rows = self._rows(data)
        self.tables.settle(rows, self.live[:, rows])
        assert np.array_equal(self.tables.owned[:, rows], -(-self.live[:, rows] // PAGE))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        for row in self._rows(data):
            self.tables.release(row)
            self.live[:, row] = 0
            assert (self.tables.table[:, row] == NO_PAGE).all()

    @precondition(lambda self: hasattr(self, "tables"))
    @invariant()
    def nothing_is_lost_and_live_slots_have_pages(self) -> None:
        self.tables.check_integrity()
        assert (self.live <= self.tables.bound).all()
        assert (self.live <= self.tables.owned * PAGE).all()


Tables.TestCase.settings = settings(
    max_examples=60, stateful_step_count=15, deadline=None, derandomize=True
)
test_no_page_is_owned_twice_and_none_is_lost = Tables.TestCase


def test_a_page_owned_twice_is_found() -> None:
    tables = PageTables(1, 2, 1, 2, 4)
    tables.reserve([0, 1], 1)
    tables.table[0, 1, 0] = tables.table[0, 0, 0]
    with pytest.raises(AssertionError, match="lost or twice"):
        tables.check_integrity()


def test_running_out_names_the_size_and_the_knob_and_changes_nothing() -> None:
    tables = PageTables(3, 2, 2, 3, pages=5, page_bytes=1024, knob="turn the knob")
    tables.reserve([0], 65)
    before = tables.table.copy()
    with pytest.raises(
        OutOfPagesError,
        match=r"out of pages: .* 5 pages of 64 slots in each of 3 layers \(15360 bytes\); layer 0 has 4 in use, "
        "and 2 more are asked for; turn the knob",
    ):
        tables.reserve([1], 1)
    assert np.array_equal(tables.table, before)
    assert tables.free.tolist() == [1, 1, 1]


def test_layers_have_pages_of_their_own() -> None:
    tables = PageTables(2, 2, 1, 3, pages=3)
    tables.reserve([0], 2 * PAGE)
    # The same ids, each a page of its own layer.
    assert tables.table[:, 0, 0].tolist() == [[2, 1, NO_PAGE]] * 2
    tables.settle([0], np.array([[[2]], [[PAGE + 1]]], np.int32))
    assert (tables.free.tolist(), tables.in_use) == ([2, 1], 3)
    before = tables.table.copy()
    # The first layer has room for it, and the second one none: nothing is taken of either.
    with pytest.raises(OutOfPagesError, match="layer 1 has 2 in use, and 2 more"):
        tables.reserve([1], 2 * PAGE)
    assert np.array_equal(tables.table, before)
    tables.check_integrity()


def test_a_pool_smaller_than_one_sequence_is_refused_at_once() -> None:
    with pytest.raises(OutOfPagesError, match=r"pages=1 cannot hold one sequence: its 2 lists"):
        PageTables(2, 1, 2, 8, pages=1)
    PageTables(2, 1, 2, 8, pages=2)


def test_lists_that_are_full_need_no_more_pages() -> None:
    tables = PageTables(1, 1, 1, 2, pages=2)
    tables.reserve([0], 2 * PAGE)
    tables.advance([0], 2 * PAGE)
    assert not tables.reserve([0], 500)
    assert tables.covers([0], 500)
