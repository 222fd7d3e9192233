# SPDX-License-Identifier: Apache-2.0
"""`generate` against `tools/differential.py`, which computes in float64 by itself; a short soak of one cache."""

import importlib.util
import sys
from types import ModuleType

import pytest
from paths import ROOT


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check(seeds: range) -> None:
    differential = tool("differential")
    for seed in seeds:
        worst, nearest, _ = differential.run(seed)
        assert nearest < differential.NEAR or worst < differential.CLOSE, (seed, worst)


def test_generate_gives_the_logits_of_a_float64_implementation() -> None:
    check(range(4))


@pytest.mark.slow
def test_generate_gives_the_logits_of_a_float64_implementation_in_more_cases() -> None:
    check(range(4, 34))


@pytest.mark.slow
def test_a_cache_stays_right_and_whole_over_many_crops_forks_and_reorderings() -> None:
    soak = tool("soak")
    worst, _ = soak.run(1000, 0, lambda line: None)
    assert worst < soak.CLOSE
