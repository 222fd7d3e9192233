# SPDX-License-Identifier: Apache-2.0
"""A server of the embedded model, one a file of tests: what it counts is that file's."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    from http_server import model_and_tokenizer

    return model_and_tokenizer()


@pytest.fixture(scope="module")
def served(parts: tuple[Any, Any]) -> Iterator[Any]:
    from http_server import serving

    with serving(*parts) as found:
        yield found
