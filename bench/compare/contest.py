"""Contests: optimizers step the same gradients in turn, and their times, memory and launches are measured.

Each contestant has weights of its own. T is 2, so that updates and other steps alternate. The mean step at another T
follows from these: (update + (T−1)·other)/T. The first four steps, two updates among them, warm up and show the memory.
Before each step fresh gradients are copied in, outside of the measured time, as a backward pass would write them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from bench.common.launches import count_launches
from bench.common.memory import peak_bytes, state_bytes
from bench.common.optimizers import WHOLE, Entry
from bench.common.restarts import Spoiled, is_spoiled
from bench.common.timing import Sample, Stopwatch, Timing, host_clock
from bench.common.workloads import Matrix, Workload

PERIOD = 2
UPDATE, OTHER = "update", "other"


@dataclass(frozen=True)
class Limits:
    """Numbers of samples of each kind of step, and seconds for a contestant without its warm-up."""

    most: int = 10
    least: int = 3
    seconds: float = 2.0
    all_seconds: float = 40.0
    """After these a contestant gets no more samples, even if it has fewer than `least`, but at least one."""


class Case(NamedTuple):
    """An entry with a block size on a workload."""

    entry: Entry
    workload: Workload
    block: int = WHOLE

    @property
    def title(self) -> str:
        return f"{self.workload.name}, {self.entry.name}, {self.block}"

    @property
    def shapes(self) -> tuple[Matrix, ...]:
        """Return the weights that the entry gets: the blocks, if it does not cut by itself."""
        return self.workload.shapes if self.entry.cuts else self.workload.blocks(self.block)

    @property
    def is_uncut(self) -> bool:
        return self.workload.longest_side <= self.block or self.entry.family == "diagonal"


def cases_of(entry: Entry, workload: Workload, device: torch.device) -> list[Case]:
    """Return a case for each block size of an entry that cuts the workload differently.

    On a CPU, an update of a whole 1024 × 4096 weight by Distributed Shampoo or SOAP would take a third of a minute.
    """
    if entry.family == "diagonal":
        return [Case(entry, workload, max(entry.blocks))]
    slow = device.type == "cpu" and entry.family in ("Shampoo", "SOAP") and workload.longest_side > 2048
    sizes = entry.blocks[:1] if slow else entry.blocks
    different = {workload.blocks(size): size for size in sorted(sizes)}
    return [Case(entry, workload, size) for size in sorted(different.values())]


class Gradients:
    """Random gradients: in a step of one number the same for all, however they cut the weights."""

    SETS = 3

    def __init__(self, num_weights: int, device: torch.device) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        self.flat = [torch.randn(num_weights, generator=generator, device=device).mul_(0.1) for _ in range(self.SETS)]
        self.buffers: dict[tuple[tuple[Matrix, ...], torch.dtype], list[Tensor]] = {}

    def of(self, shapes: tuple[Matrix, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return the gradients of weights of these shapes, which contestants share. `refresh` changes their values."""
        if (shapes, dtype) not in self.buffers:
            device = self.flat[0].device
            self.buffers[shapes, dtype] = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        return self.buffers[shapes, dtype]

    def refresh(self, shapes: tuple[Matrix, ...], step: int, dtype: torch.dtype = torch.float32) -> None:
        """Copy the gradients of a step, by its number, to the tensors of `of`."""
        parts = self.flat[step % self.SETS].split([prod(shape) for shape in shapes])
        torch._foreach_copy_(self.of(shapes, dtype), [x.view(s) for x, s in zip(parts, shapes, strict=True)])


@dataclass
class Contestant:
    """A case with its weights, its optimizer and its samples."""

    case: Case
    gradients: Gradients
    clock: Any
    device: torch.device
    period: int = PERIOD
    params: list[Parameter] = field(default_factory=list)
    optimizer: Optimizer | None = None
    num_steps: int = 0
    spent: float = 0.0
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {UPDATE: [], OTHER: []})
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.entry, self.shapes = self.case.entry, self.case.shapes
        self.stopwatch = Stopwatch(self.clock)

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
        """Return the environment in which the first steps choose the entry's backend."""
        return patch.dict(os.environ, {"ROOTFREE_BACKEND": self.entry.backend} if self.entry.backend else {})

    def _first_steps(self) -> None:
        self.optimizer = self.entry.make(self.params, self.period, self.case.block)
        leads = []
        for _ in range(2 * self.period):
            self.stopwatch.warm_up(self.step)
            leads.append(self.stopwatch.lead)
        self.stopwatch.lead = max(leads[self.period :])  # nothing is compiled any more; the longer kind decides

    def step(self) -> None:
        assert self.optimizer is not None
        self.optimizer.step()
        self.num_steps += 1

    @property
    def kind(self) -> str:
        """Return the kind of the next step. Without a period every second step counts as an update."""
        return UPDATE if self.num_steps % self.period == self.entry.update_at % self.period else OTHER

    def sample(self) -> None:
        """Take a step and its time."""
        begin = time.perf_counter()
        kind = self.kind
        self.gradients.refresh(self.shapes, self.num_steps, self.entry.weights)
        self.samples[kind].append(self.stopwatch.time(self.step))
        self.spent += time.perf_counter() - begin

    def is_done(self, limits: Limits) -> bool:
        fewest = min(map(len, self.samples.values()))
        if fewest >= limits.most or (self.spent > limits.all_seconds and fewest):
            return True
        return fewest >= limits.least and self.spent > limits.seconds

    def timings(self) -> dict[str, Timing]:
        """Return the times of both kinds of steps. Without a period all samples are of both."""
        samples = self.samples
        if not self.entry.has_period:
            samples = dict.fromkeys(samples, samples[UPDATE] + samples[OTHER])
        return {kind: Timing.of_samples(found) for kind, found in samples.items()}

    def measured(self) -> dict[str, Any]:
        """Return the figures of a row: µs, bytes a weight, launches, and on a GPU the µs of the host."""
        assert self.optimizer is not None
        num_weights = sum(map(prod, self.shapes))
        host = Stopwatch(host_clock(self.device))
        on_host = range(self.period if self.device.type == "cuda" else 0)
        return {
            **{kind: timing._asdict() for kind, timing in self.timings().items()},
            "state_bytes": state_bytes(self.optimizer, self.params) / num_weights,
            "peak_bytes": self.peak_bytes / num_weights,
            **{f"launches of {self.kind}": count_launches(self.step, self.device) for _ in range(self.period)},
            **{f"host of {self.kind}": host.time(self.step).time for _ in on_host},
        }


def mean_step(measured: dict[str, Any], period: int) -> float:
    """Return the µs of a step on average, if every `period`-th is an update."""
    update, other = (measured[kind]["median"] for kind in (UPDATE, OTHER))
    return float(update + (period - 1) * other) / period


def run_contest(
    contestants: Sequence[Contestant],
    limits: Limits,
    deadline: float,
    on_turn: Callable[[Contestant], None] = lambda contestant: None,
) -> dict[int, str]:
    """Let contestants step in turn until each has its samples; return by number the errors of those that failed.

    `on_turn` is called before each turn. After the deadline no contestant begins, and those that have begun take one
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
    """Return the text of an error, and free the memory of its contestant for the others."""
    if is_spoiled(contestant.device):
        raise Spoiled(f"{type(error).__name__}: {error}") from error
    contestant.params, contestant.optimizer = [], None
    return f"{type(error).__name__}: {error}"
