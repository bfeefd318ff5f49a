"""Measure how long calls take: on a GPU by device events, on a CPU by the host's clock.

Variants take turns in one process. Inputs change from call to call, and the first calls warm up. On a GPU the device
sleeps before each call for longer than the host takes to queue it, so that no gap of the host is in the time; every
sample records whether that worked. All times are in microseconds.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

Call = Callable[[], Any]

KERNELS = "rootfree_kernels.triton_kernels"
MAX_LEAD = 20_000.0
"""The longest sleep of the device before a call, in µs. A call that takes the host longer is timed with its gaps."""


class Sample(NamedTuple):
    """The time of one call in µs, and of its stages by name."""

    time: float
    queued: bool = True
    """False if the device had to wait for the host to queue the call, so that gaps of the host are in the time."""
    stages: Mapping[str, float] = {}


class Timing(NamedTuple):
    """Quantiles of a time, in µs."""

    median: float
    p10: float
    p90: float
    samples: int
    queued: bool = True
    """False if the device had to wait for the host, so that gaps of the host are in the samples."""

    @classmethod
    def of(cls, samples: Sequence[float], queued: bool = True) -> Timing:
        ordered = sorted(samples)
        median, p10, p90 = (ordered[round(q * (len(ordered) - 1))] for q in (0.5, 0.1, 0.9))
        return cls(median, p10, p90, len(ordered), queued)

    @classmethod
    def of_samples(cls, samples: Sequence[Sample]) -> Timing:
        """Return the quantiles of the queued samples; of all samples if most were not queued."""
        kept, queued = _kept(samples)
        return cls.of([sample.time for sample in kept], queued)


def _kept(samples: Sequence[Sample]) -> tuple[Sequence[Sample], bool]:
    """Return the samples that count, and whether they were queued."""
    kept = [sample for sample in samples if sample.queued]
    queued = 2 * len(kept) >= len(samples)
    return (kept if queued else samples), queued


# ---- clocks --------------------------------------------------------------------------------------------------------


class HostClock:
    """Times of the host: a call is over when it returns. `wait` waits for the device before and after each call."""

    def __init__(self, wait: Call = lambda: None) -> None:
        self.synchronize = wait

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed(self, start: float, end: float) -> float:
        return (end - start) * 1e6

    def lead(self, microseconds: float) -> None:
        pass

    def reached(self, mark: float) -> bool:
        return False


class DeviceClock:
    """Times of a GPU, by events in its current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cycles = 1_000_000
        for _ in range(2):  # the first wakes the device up
            start = self.mark()
            torch.cuda._sleep(self.cycles)
            end = self.mark()
            self.synchronize()
        self.cycles_per_microsecond = self.cycles / max(self.elapsed(start, end), 1.0)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) * 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def lead(self, microseconds: float) -> None:
        """Keep the device busy for this long."""
        torch.cuda._sleep(int(microseconds * self.cycles_per_microsecond))

    def reached(self, mark: torch.cuda.Event) -> bool:
        """Return whether the device has come to a mark."""
        return bool(mark.query())


def clock_of(device: torch.device) -> HostClock | DeviceClock:
    """Return the clock that times the work of a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


def host_clock(device: torch.device) -> HostClock:
    """Return a clock that times the host in a call, with the device's queue empty before."""
    return HostClock(partial(torch.cuda.synchronize, device)) if device.type == "cuda" else HostClock()


# ---- stages of a call ----------------------------------------------------------------------------------------------


@contextmanager
def recorded_stages(clock: Any, into: list[tuple[str, Any, Any]]) -> Iterator[None]:
    """Append (name, start, end) of every Triton launch and every `torch.bmm` to a list.

    A name that comes a second time gets a number: "bmm", "bmm 2".
    """

    def recorded(function: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = clock.mark()
            result = function(*args, **options)
            end = clock.mark()
            number = 1 + sum(name.split(" ")[0] == name_of(*args) for name, _, _ in into)
            into.append((f"{name_of(*args)} {number}" if number > 1 else name_of(*args), start, end))
            return result

        return call

    modules = [x for name, x in [*sys.modules.items()] if name.startswith(f"{KERNELS}.") and hasattr(x, "launch")]
    with ExitStack() as stack:
        for module in modules:
            launch = recorded(module.launch, lambda kernel, *args: getattr(kernel, "__name__", "kernel"))
            stack.enter_context(patch.object(module, "launch", launch))
        stack.enter_context(patch.object(torch, "bmm", recorded(torch.bmm, lambda *args: "bmm")))
        yield


# ---- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Stopwatch:
    """Times single calls. Before each one the device sleeps for longer than the host takes to queue the call."""

    clock: Any
    retries: int = 0
    """The number of calls that may be repeated, after a longer sleep, because they were not queued in time."""
    lead: float = 0.0
    """The µs that the device sleeps."""

    def warm_up(self, call: Call) -> None:
        """Call without timing the device, and set the lead by the time that the host takes."""
        self.clock.synchronize()
        start = time.perf_counter()
        call()
        self.lead = min(2e6 * (time.perf_counter() - start) + 20.0, MAX_LEAD)

    def time(self, call: Call, stages: bool = False) -> Sample:
        """Return the time of a call, and of its stages if asked for."""
        sample = self._time_once(call, stages)
        while not sample.queued and self.retries:
            self.retries -= 1
            self.lead = min(2.0 * self.lead, MAX_LEAD)
            sample = self._time_once(call, stages)
        return sample

    def _time_once(self, call: Call, stages: bool) -> Sample:
        marks: list[tuple[str, Any, Any]] = []
        with recorded_stages(self.clock, marks) if stages else nullcontext():
            self.clock.synchronize()
            self.clock.lead(self.lead)
            start = self.clock.mark()
            call()
            end = self.clock.mark()
            queued = not self.clock.reached(start)
        self.clock.synchronize()
        times = {name: self.clock.elapsed(*pair) for name, *pair in marks}
        return Sample(self.clock.elapsed(start, end), queued, times)


class Measured(NamedTuple):
    """The time of a variant, and of each of its stages if they were asked for."""

    total: Timing
    stages: dict[str, Timing]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Measured:
        kept, queued = _kept(samples)
        names = dict.fromkeys(name for sample in kept for name in sample.stages)
        stages = {name: [x.stages[name] for x in kept if name in x.stages] for name in names}
        return cls(Timing.of_samples(samples), {name: Timing.of(times, queued) for name, times in stages.items()})


@dataclass
class Timer:
    """A clock, and how often and for how long it measures."""

    clock: Any
    warmups: int = 10
    repeats: int = 50
    min_repeats: int = 10
    seconds: float = 4.0
    """The time for a measurement of all its variants: beyond it there are fewer repeats, but `min_repeats`."""

    def measure(self, variants: Mapping[str, Sequence[Call]], stages: bool = False) -> dict[str, Measured]:
        """Time variants, which take turns. Each is a sequence of calls on different inputs, which take turns too."""
        return {name: Measured.of(samples) for name, samples in self.samples(variants, stages).items()}

    def samples(
        self, variants: Mapping[str, Sequence[Call]], stages: bool = False, before: Call = lambda: None
    ) -> dict[str, list[Sample]]:
        """Return the samples of variants in the order of time. `before` is called before each sample.

        The order of the variants is reversed every time: a call finds the caches as the one before left them.
        """
        found: dict[str, list[Sample]] = {name: [] for name in variants}
        watches = {name: Stopwatch(self.clock, retries=6) for name in variants}
        for name, calls in variants.items():
            for index in range(max(self.warmups, 1)):
                before()
                watches[name].warm_up(calls[index % len(calls)])
        start, done, wanted = time.perf_counter(), 0, 1
        while done < wanted:
            for name in [*variants][:: -1 if done % 2 else 1]:
                before()
                call = variants[name][done % len(variants[name])]
                found[name].append(watches[name].time(call, stages))
            done += 1
            if done == 1:
                affordable = int(self.seconds / max(time.perf_counter() - start, 1e-6))
                wanted = min(self.repeats, max(self.min_repeats, affordable))
        return found

    def host(self, call: Call, before: Call = lambda: None) -> Timing:
        """Return the host's time in `call`, with the device's queue empty before. `before` is not timed."""
        on_host = replace(self, clock=HostClock(self.clock.synchronize), min_repeats=self.repeats)
        return Timing.of_samples(on_host.samples({"call": [call]}, before=before)["call"])


def num_inputs(bytes_of_one: float, device: torch.device) -> int:
    """Return how many inputs, at most 8, must take turns so that the cache keeps none from the call before."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    cache = getattr(properties, "L2_cache_size", 0) or 1 << 26  # 64 MB if the device does not tell
    return max(1, min(8, math.ceil(3 * cache / max(bytes_of_one, 1.0))))
