# SPDX-License-Identifier: Apache-2.0
"""Settings that all tests share."""

import os

# Two workers with two threads each would wait for each other on two cores. Threads are counted when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# Kernels are interpreted; `make test-gpu` says otherwise. Triton reads this when it is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A loaded two-core machine is no reason to fail; failures are printed with the lines that repeat them.
hypothesis.settings.register_profile("tests", deadline=None, max_examples=60, print_blob=True)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, or where kernels are interpreted."""
    if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] != "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA: make test-gpu"))
