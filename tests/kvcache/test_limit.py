# SPDX-License-Identifier: Apache-2.0
"""Limits of a cache as a user writes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_dms, tokens

import modelopt_dms as dms
from modelopt_dms.kvcache import limit
from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.kvcache.limit import limit_in_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (1, 1),
        (123, 123),
        ("40GiB", 40 << 30),
        ("5MB", 5_000_000),
        ("512M", 512 << 20),
        ("2 kib", 2048),
        ("25%", 250),
        ("100%", 1000),
    ],
)
def test_limits(monkeypatch: pytest.MonkeyPatch, written: Any, expected: int) -> None:
    monkeypatch.setattr(limit, "free_bytes", lambda device: 1000)
    assert limit_in_bytes(written, CPU) == expected


@pytest.mark.parametrize(
    "written",
    [0, -5, True, "", "4Gi4", "-1%", "0%", "101%", "nan%", "x%", "12 elephants", None, 0.9],
)
def test_what_is_no_limit_is_refused_by_name(written: Any) -> None:
    with pytest.raises(ValueError, match=r"max_cache_bytes=.*'40GiB'.*share"):
        limit_in_bytes(written, CPU)


def test_free_memory_is_what_the_system_says() -> None:
    lines = dict(x.split(":") for x in Path("/proc/meminfo").read_text().splitlines())
    total = int(lines["MemTotal"].split()[0]) * 1024
    assert 0 < limit.free_bytes(CPU) < total


def test_a_share_of_free_memory_bounds_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "free_bytes", lambda device: 1 << 22)
    model = build_dms("llama")
    cache = dms.DMSCache(model, batch_size=2, max_length=200, max_cache_bytes="50%")
    with torch.no_grad():
        model(tokens(2, 100), past_key_values=cache)
    assert 0.9 * (1 << 21) < kv_stats(cache).reserved_bytes <= 1 << 21
