"""Times on a GPU: device events around a call that was queued ahead, so that no gap of the host is in them.

Variants take turns in one process, inputs change from call to call, and the first calls warm up. Before each call the
device is put to sleep for longer than the host takes to queue it; whether that worked is checked for every sample. All
times are in microseconds.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

Call = Callable[[], Any]

KERNELS = "rootfree_kernels.triton_kernels"
MAX_LEAD = 20_000.0
"""µs that the device sleeps before a call, at most: a call that takes the host longer is timed with its gaps."""


class Timing(NamedTuple):
    """Quantiles of a time, in µs."""

    median: float
    p10: float
    p90: float
    samples: int
    queued: bool = True
    """Whether the samples were queued before the device began with them; otherwise gaps of the host are included."""

    @classmethod
    def of(cls, samples: Sequence[float], queued: bool = True) -> Timing:
        ordered = sorted(samples)
        median, p10, p90 = (ordered[round(q * (len(ordered) - 1))] for q in (0.5, 0.1, 0.9))
        return cls(median, p10, p90, len(ordered), queued)


class HostClock:
    """Times of the host, for a machine without a GPU: a call is over when it returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed(self, start: float, end: float) -> float:
        return (end - start) * 1e6

    def synchronize(self) -> None:
        pass

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
        """Whether the device has come to a mark."""
        return bool(mark.query())


def clock_of(device: torch.device) -> HostClock | DeviceClock:
    return DeviceClock(device) if device.type == "cuda" else HostClock()


# ---- stages of a call --------------------------------------------------------------------------------------------


@contextmanager
def recorded_stages(clock: Any, into: list[tuple[str, Any, Any]]) -> Iterator[None]:
    """Put (name, start, end) of every Triton launch and every `torch.bmm` into a list; of a name that comes again,
    the second is called "name 2"."""

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


# ---- measuring ---------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """The time of a variant, and of each of its stages where they were asked for."""

    total: Timing
    stages: dict[str, Timing]


class _Sample(NamedTuple):
    total: float
    stages: dict[str, float]
    queued: bool


@dataclass
class _Variant:
    """What is measured of a variant, as far as it has come."""

    calls: Sequence[Call]
    lead: float = 0.0
    retries: int = 6  # of samples that the device began with before they were queued
    samples: list[_Sample] = field(default_factory=list)

    def next_call(self) -> Call:
        return self.calls[len(self.samples) % len(self.calls)]

    def measured(self) -> Measured:
        kept = [sample for sample in self.samples if sample.queued]
        queued = 2 * len(kept) >= len(self.samples)  # a few for which the host was held up are left out
        if not queued:
            kept = self.samples
        names = dict.fromkeys(name for sample in kept for name in sample.stages)
        stages = {name: [x.stages[name] for x in kept if name in x.stages] for name in names}
        times = {name: Timing.of(values, queued) for name, values in stages.items()}
        return Measured(Timing.of([sample.total for sample in kept], queued), times)


@dataclass
class Timer:
    """How often and how long is measured."""

    clock: Any
    warmups: int = 10
    repeats: int = 50
    min_repeats: int = 10
    seconds: float = 4.0
    """That a measurement of all its variants may take; beyond it there are fewer repeats."""

    def measure(self, variants: Mapping[str, Sequence[Call]], stages: bool = False) -> dict[str, Measured]:
        """Time variants, which take turns; each is a sequence of calls, on other inputs each, that take turns too."""
        running = {name: _Variant(calls) for name, calls in variants.items()}
        for variant in running.values():
            self._warm_up(variant)
        start = time.perf_counter()
        self._sample_all(running.values(), stages)
        repeats = int(self.seconds / max(time.perf_counter() - start, 1e-6))
        for _ in range(max(self.min_repeats, min(self.repeats, repeats)) - 1):
            self._sample_all(running.values(), stages)
        return {name: variant.measured() for name, variant in running.items()}

    def _sample_all(self, variants: Iterable[_Variant], stages: bool) -> None:
        for variant in variants:
            variant.samples.append(self._queued_sample(variant, stages))

    def _warm_up(self, variant: _Variant) -> None:
        host = 0.0
        for index in range(max(self.warmups, 1)):
            self.clock.synchronize()
            start = time.perf_counter()
            variant.calls[index % len(variant.calls)]()
            host = (time.perf_counter() - start) * 1e6
        variant.lead = min(2.0 * host + 20.0, MAX_LEAD)

    def _queued_sample(self, variant: _Variant, stages: bool) -> _Sample:
        sample = self._sample(variant, stages)
        while not sample.queued and variant.retries:
            variant.retries -= 1
            variant.lead = min(2.0 * variant.lead, MAX_LEAD)
            sample = self._sample(variant, stages)
        return sample

    def _sample(self, variant: _Variant, stages: bool) -> _Sample:
        marks: list[tuple[str, Any, Any]] = []
        call = variant.next_call()
        with recorded_stages(self.clock, marks) if stages else ExitStack():
            self.clock.synchronize()
            self.clock.lead(variant.lead)
            start = self.clock.mark()
            call()
            end = self.clock.mark()
            queued = not self.clock.reached(start)
        self.clock.synchronize()
        times = {name: self.clock.elapsed(*pair) for name, *pair in marks}
        return _Sample(self.clock.elapsed(start, end), times, queued)

    def host(self, call: Call, before: Call = lambda: None) -> Timing:
        """µs of the host in `call`, which the device's queue is empty before."""
        samples = []
        for index in range(self.warmups + self.repeats):
            before()
            self.clock.synchronize()
            start = time.perf_counter()
            call()
            if index >= self.warmups:
                samples.append((time.perf_counter() - start) * 1e6)
        self.clock.synchronize()
        return Timing.of(samples)


def cache_bytes(device: torch.device) -> int:
    """Bytes of the device's last-level cache, 64 MB where it does not tell."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "L2_cache_size", 0) or 1 << 26


def num_inputs(bytes_of_one: float, device: torch.device) -> int:
    """How many inputs a call needs in turn so that none of it is left in the cache from the time before: at most 8."""
    return max(1, min(8, math.ceil(3 * cache_bytes(device) / max(bytes_of_one, 1.0))))
