# SPDX-License-Identifier: Apache-2.0
"""The schedule asks for what makes the physical compression ratio right."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelopt_dms.config.compression_ratio import (
    check_reachable,
    evictable_tokens,
    physical_cr,
    target_evicted_fraction,
)
from modelopt_dms.training.progress import scheduled_cr


def test_ratio_rises_linearly_then_holds():
    found = [scheduled_cr(step, 10, 5.0, 0.5) for step in range(10)]
    assert found == pytest.approx([1.0, 1.8, 2.6, 3.4, 4.2, 5.0, 5.0, 5.0, 5.0, 5.0])


@given(st.integers(1, 200), st.floats(1, 64), st.floats(0.01, 1))
def test_ratio_starts_at_one_never_falls_and_ends_at_target(steps, target, ramp):
    found = [scheduled_cr(step, steps, target, ramp) for step in range(steps + 1)]
    assert found[0] == 1.0
    assert found == sorted(found)
    assert found[-1] == pytest.approx(target)


@given(st.integers(1, 60), st.integers(0, 70), st.integers(0, 5), st.integers(0, 100))
def test_physical_ratio_counts_live_tokens_of_the_delayed_mask(length, window, protected, percent):
    """A marked token lives while it is at most `window` tokens old; the protected ones are never marked."""
    last = length - 1
    evictable = [j for j in range(length) if last - j > window and j >= protected]
    assert evictable_tokens(length, window, protected) == len(evictable)
    evicted = len(evictable) * percent // 100
    share = evicted / len(evictable) if evictable else 0.0
    assert physical_cr(share, length, window, protected) == pytest.approx(
        length / (length - evicted)
    )


@given(st.floats(1, 32), st.integers(8, 5000), st.integers(1, 500), st.integers(0, 8))
def test_target_fraction_gives_the_physical_ratio_wherever_it_is_reachable(
    cr, length, window, first
):
    try:
        check_reachable(cr, window, length, first)
    except ValueError:
        assert length - evictable_tokens(length, window, first) > length / cr
        return
    fraction = target_evicted_fraction(cr, length, window, first)
    assert 0 <= fraction <= 1 + 1e-9
    assert physical_cr(fraction, length, window, first) == pytest.approx(cr)


def test_target_fraction_approaches_the_papers_on_long_sequences():
    assert target_evicted_fraction(4.0, 10**7, 256) == pytest.approx(0.75, abs=1e-4)
    assert target_evicted_fraction(4.0, 1024, 128) == pytest.approx(0.75 * 1024 / 895)


def test_unreachable_ratio_is_refused_with_settings_that_work():
    with pytest.raises(
        ValueError, match="target_cr=4 .*window=256.*sequence_length=512"
    ) as refusal:
        check_reachable(4.0, 256, 512)
    length, window = map(int, re.findall(r">= (\d+) or window <= (\d+)", str(refusal.value))[0])
    check_reachable(4.0, 256, length)
    check_reachable(4.0, window, 512)
    with pytest.raises(ValueError):
        check_reachable(4.0, 256, length - 1)
    with pytest.raises(ValueError):
        check_reachable(4.0, window + 1, 512)


def test_no_compression_is_always_reachable():
    check_reachable(1.0, 4096, 128)
    assert target_evicted_fraction(1.0, 128, 4096) == 0.0
