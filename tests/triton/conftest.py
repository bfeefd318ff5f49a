"""Fill new memory with NaN in all tests of these kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.calls.uninitialized import new_memory_is_nan


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    with new_memory_is_nan():
        yield
