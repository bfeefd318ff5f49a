"""Fakes with which a benchmark's figures are known: a clock, optimizers whose steps move it, and missing packages."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from bench.common import peers, timing
from bench.common.optimizers import ENTRIES, Entry
from bench.compare import contest, plots, scaling, training


class FakeClock:
    """A clock in µs that only optimizers move. `leads` records and `late` decides what a GPU would do."""

    def __init__(self) -> None:
        self.now = 0.0
        self.leads: list[float] = []
        self.late = False
        """Whether the device begins with a step before all of it is queued."""

    def mark(self) -> float:
        return self.now

    def elapsed(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        pass

    def lead(self, microseconds: float) -> None:
        self.leads.append(microseconds)

    def reached(self, mark: float) -> bool:
        return self.late

    def seconds(self) -> float:
        return self.now / 1e6


def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Return the one clock of all modules that time contestants."""
    clock = FakeClock()
    for module in (contest, scaling, timing, training):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.seconds))
    return clock


Cost = Callable[[int], float]
"""µs of a step by its number."""


class FakeOptimizer(torch.optim.Optimizer):
    """An optimizer whose steps take a given time. It records the gradients that it saw."""

    def __init__(self, params: Any, clock: FakeClock, cost: Cost, name: str = "", log: Any = None) -> None:
        super().__init__(params, {})
        self.clock, self.cost, self.name, self.log = clock, cost, name, log
        self.number = 0
        self.seen: list[list[float]] = []

    def step(self, closure: Any = None) -> None:
        params: list[Tensor] = [param for group in self.param_groups for param in group["params"]]
        self.seen.append([x for param in params if param.grad is not None for x in param.grad.flatten().tolist()])
        self.clock.now += self.cost(self.number)
        self.number += 1
        if self.log is not None:
            self.log.append(self.name)


def two_costs(update: float, other: float, update_at: int, period: int) -> Cost:
    return lambda number: update if number % period == update_at % period else other


def fake_entry(name: str, clock: FakeClock, cost: Cost | None = None, log: Any = None, **changes: Any) -> Entry:
    """Return an entry of a fake. Without a cost, updates take 700 µs and other steps 100."""
    update_at = changes.get("update_at", 0)

    def make(params: Sequence[Any], period: int, block: int) -> FakeOptimizer:
        chosen = cost or two_costs(700.0, 100.0, update_at, period)
        return FakeOptimizer(params, clock, chosen, name, log)

    return Entry(name, changes.pop("family", "IFShampoo"), partial(make), **changes)


def failing_at(number: int, cost: float = 100.0) -> Cost:
    """Return the cost of steps of which one raises."""

    def of(step: int) -> float:
        if step == number:
            raise RuntimeError(f"broken in step {number}")
        return cost

    return of


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the global generator alone, and keep the garbage collector from objects of other tests, which is slow."""
    gc.collect()
    gc.freeze()
    with torch.random.fork_rng():
        yield
    gc.unfreeze()


@contextmanager
def in_place_of_all(*entries: Entry) -> Iterator[None]:
    """Make these the only entries."""
    with patch.dict(ENTRIES, {entry.name: entry for entry in entries}, clear=True):
        yield


@contextmanager
def without_peers(folder: Path) -> Iterator[None]:
    """Act as a machine where no peer is installed, with an empty folder for checkouts."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(peers, "CHECKOUTS", folder)
        for module in peers.PEERS:
            monkeypatch.setitem(sys.modules, module, None)
        peers.find.cache_clear()
        yield
    peers.find.cache_clear()


def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as if matplotlib were not installed."""
    find_spec = plots.find_spec
    monkeypatch.setattr(plots, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
