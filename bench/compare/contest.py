"""Optimizers that step the same gradients in turn, and what is measured of each.

Each contestant has weights of its own. T is 2, so that updates and other steps alternate; what a step costs on average
at another T follows, (update + (T−1)·other)/T. The first four steps, two updates among them, warm up and show the
memory. Before a step fresh gradients are copied in, outside of the time, as a backward pass would have written them.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from bench.common.launches import count_launches
from bench.common.memory import peak_bytes, state_bytes
from bench.common.optimizers import Entry
from bench.common.restarts import Spoiled, is_spoiled
from bench.common.timing import MAX_LEAD, Timing
from bench.common.workloads import Matrix, Workload

PERIOD = 2
UPDATE, OTHER = "update", "other"


@dataclass(frozen=True)
class Limits:
    """How long is measured: samples of a kind of step, and seconds that a contestant gets, warm-up left out."""

    most: int = 10
    least: int = 3
    seconds: float = 2.0
    all_seconds: float = 40.0
    """Beyond these, a contestant gets no more samples even if it has fewer than `least`, but one."""


class Gradients:
    """Random gradients: in a step of the same number the same ones for all, whatever they cut the weights into."""

    SETS = 3

    def __init__(self, num_weights: int, device: torch.device) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        self.flat = [torch.randn(num_weights, generator=generator, device=device).mul_(0.1) for _ in range(self.SETS)]
        self.buffers: dict[tuple[tuple[Matrix, ...], torch.dtype], list[Tensor]] = {}

    def of(self, shapes: tuple[Matrix, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Those of weights of these shapes, where contestants share them; `refresh` changes the values."""
        if (shapes, dtype) not in self.buffers:
            device = self.flat[0].device
            self.buffers[shapes, dtype] = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        return self.buffers[shapes, dtype]

    def refresh(self, shapes: tuple[Matrix, ...], step: int, dtype: torch.dtype = torch.float32) -> None:
        """Put the gradients of a step, by its number, where `of` says."""
        parts = self.flat[step % self.SETS].split([prod(shape) for shape in shapes])
        torch._foreach_copy_(self.of(shapes, dtype), [x.view(s) for x, s in zip(parts, shapes, strict=True)])


@dataclass
class Contestant:
    """An entry with a block size at work on a workload."""

    entry: Entry
    block: int
    shapes: tuple[Matrix, ...]
    gradients: Gradients
    clock: Any
    device: torch.device
    period: int = PERIOD
    params: list[Parameter] = field(default_factory=list)
    optimizer: Optimizer | None = None
    num_steps: int = 0
    spent: float = 0.0
    lead: float = 0.0
    times: dict[str, list[float]] = field(default_factory=lambda: {UPDATE: [], OTHER: []})
    queued: dict[str, list[bool]] = field(default_factory=lambda: {UPDATE: [], OTHER: []})
    peak_bytes: int = 0

    def prepare(self) -> None:
        """Make weights and optimizer, and take the first steps."""
        generator = torch.Generator(device=self.device).manual_seed(1)
        options = {"generator": generator, "device": self.device}
        weights = [torch.randn(shape, **options).mul_(0.02) for shape in self.shapes]
        self.params = [Parameter(x.to(self.entry.weights)) for x in weights]
        self.gradients.refresh(self.shapes, 0, self.entry.weights)
        for param, grad in zip(self.params, self.gradients.of(self.shapes, self.entry.weights), strict=True):
            param.grad = grad
        with self._backend():
            self.peak_bytes = peak_bytes(self._first_steps, self.device)

    def _backend(self) -> AbstractContextManager[Any]:
        """The environment in which the first steps choose the entry's backend."""
        return patch.dict(os.environ, {"ROOTFREE_BACKEND": self.entry.backend} if self.entry.backend else {})

    def _first_steps(self) -> None:
        self.optimizer = self.entry.make(self.params, self.period, self.block)
        for number in range(2 * self.period):
            start = time.perf_counter()
            self.step()
            host = (time.perf_counter() - start) * 1e6
            if number >= self.period:  # nothing is compiled any more; the longer of both kinds decides
                self.lead = max(self.lead, min(2 * host + 20.0, MAX_LEAD))

    def step(self) -> None:
        assert self.optimizer is not None
        self.optimizer.step()
        self.num_steps += 1

    @property
    def kind(self) -> str:
        """Of the next step; those without a period are at an update in every second one."""
        return UPDATE if self.num_steps % self.period == self.entry.update_at % self.period else OTHER

    def sample(self) -> None:
        """Take a step and its time."""
        begin = time.perf_counter()
        kind = self.kind
        self.gradients.refresh(self.shapes, self.num_steps, self.entry.weights)
        self.clock.synchronize()
        self.clock.lead(self.lead)
        start = self.clock.mark()
        self.step()
        end = self.clock.mark()
        self.queued[kind].append(not self.clock.reached(start))
        self.clock.synchronize()
        self.times[kind].append(self.clock.elapsed(start, end))
        self.spent += time.perf_counter() - begin

    def is_done(self, limits: Limits) -> bool:
        fewest = min(map(len, self.times.values()))
        if fewest >= limits.most or (self.spent > limits.all_seconds and fewest):
            return True
        return fewest >= limits.least and self.spent > limits.seconds

    def timings(self) -> dict[str, Timing]:
        """The times of both kinds of steps; where T makes no difference, all samples are of both."""
        samples = {kind: [*zip(self.times[kind], self.queued[kind], strict=True)] for kind in (UPDATE, OTHER)}
        if not self.entry.has_period:
            samples = dict.fromkeys(samples, samples[UPDATE] + samples[OTHER])
        return {kind: _timing(pairs) for kind, pairs in samples.items()}

    def measured(self) -> dict[str, Any]:
        """What is known of it: µs, bytes a weight, launches."""
        assert self.optimizer is not None
        num_weights = sum(map(prod, self.shapes))
        return {
            **{kind: timing._asdict() for kind, timing in self.timings().items()},
            "state_bytes": state_bytes(self.optimizer, self.params) / num_weights,
            "peak_bytes": self.peak_bytes / num_weights,
            **self._counted(),
        }

    def _counted(self) -> dict[str, Any]:
        """Launches of each kind of step, and on a GPU the host's µs in it."""
        found: dict[str, Any] = {}
        for _ in range(self.period):
            kind = self.kind
            found[f"launches of {kind}"] = count_launches(self.step, self.device)
        for _ in range(self.period if self.device.type == "cuda" else 0):
            kind = self.kind
            self.clock.synchronize()
            start = time.perf_counter()
            self.step()
            found[f"host of {kind}"] = (time.perf_counter() - start) * 1e6
        return found


def _timing(samples: Sequence[tuple[float, bool]]) -> Timing:
    """Of those that were queued, unless fewer than half were."""
    kept = [time for time, queued in samples if queued]
    queued = 2 * len(kept) >= len(samples)
    return Timing.of(kept if queued else [time for time, _ in samples], queued)


def mean_step(measured: dict[str, Any], period: int) -> float:
    """µs of a step on average, where every `period`-th updates."""
    update, other = (measured[kind]["median"] for kind in (UPDATE, OTHER))
    return float(update + (period - 1) * other) / period


def distinct_blocks(entry: Entry, workload: Workload, wanted: Iterable[int]) -> list[int]:
    """Of the block sizes of an entry those that differ on this workload; one where they make no difference."""
    sizes = [size for size in entry.blocks if size in wanted] or list(entry.blocks[:1])
    if entry.family == "diagonal":
        return [max(sizes)]
    different = {workload.blocks(size): size for size in sorted(sizes)}
    return sorted(different.values())


def shapes_for(entry: Entry, workload: Workload, block: int) -> tuple[Matrix, ...]:
    """The weights as an entry gets them: cut beforehand where it does not cut by itself."""
    return workload.shapes if entry.cuts else workload.blocks(block)


def run_contest(
    contestants: Sequence[Contestant],
    limits: Limits,
    deadline: float,
    on_turn: Callable[[Contestant], None] = lambda contestant: None,
) -> dict[int, str]:
    """Let contestants step in turn until each has its samples; return, by number, why one has none.

    `on_turn` is told whose turn it is. After the deadline none begins any more, and those that did are content with one
    sample of each kind.

    Raises:
        Spoiled: a contestant left the device in a state in which none can go on.
    """
    problems: dict[int, str] = {}
    for number, contestant in enumerate(contestants):
        try:
            if time.perf_counter() > deadline:
                raise TimeoutError("left out: the run's time was over")
            on_turn(contestant)
            contestant.prepare()
        except Exception as error:  # of any kind: it is recorded, and the others go on
            problems[number] = _give_up(contestant, error)
    running = [number for number in range(len(contestants)) if number not in problems]
    turn = 0
    while running:
        for number in running if turn % 2 else running[::-1]:
            try:
                on_turn(contestants[number])
                contestants[number].sample()
            except Exception as error:
                problems[number] = _give_up(contestants[number], error)
        enough = replace(limits, most=1) if time.perf_counter() > deadline else limits
        running = [n for n in running if n not in problems and not contestants[n].is_done(enough)]
        turn += 1
    return problems


def _give_up(contestant: Contestant, error: Exception) -> str:
    """What is recorded of an error; the memory of the one that failed is there for the others."""
    if is_spoiled(contestant.device):
        raise Spoiled(f"{type(error).__name__}: {error}") from error
    contestant.params, contestant.optimizer = [], None
    return f"{type(error).__name__}: {error}"


def release() -> None:
    """Give memory back between contests."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
