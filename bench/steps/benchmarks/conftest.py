"""Measure times in units of a reference operation, which is timed in the same round.

A busy machine, or another one, slows both alike. What is saved, shown and compared are therefore ratios, whatever unit
pytest-benchmark writes beside them: `--benchmark-compare-fail=median:10%` means ten per cent of a ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from bench.common.memory import settle_allocator

ROUNDS = 15


class Ruler:
    """A clock whose unit is the last time of a reference operation."""

    def __init__(self) -> None:
        self.unit = 1.0

    def measure(self, reference: Callable[[], Any]) -> None:
        start = time.perf_counter()
        reference()
        self.unit = time.perf_counter() - start

    def now(self) -> float:
        return time.perf_counter() / self.unit


RULER = Ruler()


def timer() -> float:
    """Return the time; pytest-benchmark uses this as its timer in this folder."""
    return RULER.now()


def pytest_configure(config: pytest.Config) -> None:
    settle_allocator()


@pytest.fixture
def in_units_of(benchmark: Any) -> Callable[..., float]:
    """Return a function that benchmarks one call in units of another, and returns the median ratio."""

    def measure(reference: Callable[[], Any], run: Callable[[], Any], warmups: int = 3) -> float:
        for _ in range(warmups):
            reference()
            run()
        benchmark._timer = timer
        benchmark.pedantic(run, setup=lambda: RULER.measure(reference), rounds=ROUNDS)
        return float(benchmark.stats.stats.median) if benchmark.stats else 0.0

    return measure
