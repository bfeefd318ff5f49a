"""The timer of all benchmarks, on a simulated device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench.common.report import cell
from bench.common.timing import HostClock, Sample, Timer, Timing, clock_of, host_clock, num_inputs

THIRTY = (30.0, 30.0, 30.0, 20, True)


class SimulatedClock:
    """A host that queues work and a device that does it, in µs."""

    def __init__(self) -> None:
        self.now = self.done = 0.0  # of the host; when the device will have done all that is queued

    def work(self, host: float, device: float) -> None:
        """Spend time on the host and then queue work."""
        self.now += host
        self.lead(device)

    def lead(self, microseconds: float) -> None:
        self.done = max(self.done, self.now) + microseconds

    def mark(self) -> float:
        return max(self.done, self.now)

    def elapsed(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)

    def reached(self, mark: float) -> bool:
        return self.now >= mark


def time_of(timer: Timer, *calls: Callable[[], None]) -> Timing:
    return timer.measure({"call": calls})["call"].total


def test_gaps_of_the_host_are_not_timed() -> None:
    """The host takes 500 µs to queue work of 30 µs."""
    clock = SimulatedClock()
    timing = time_of(Timer(clock, warmups=2, repeats=20), partial(clock.work, 500.0, 30.0))
    assert timing == pytest.approx(THIRTY)


def test_a_gpu_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated GPU has 2000 cycles a microsecond."""
    clock = SimulatedClock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.mark()

        def query(self) -> bool:
            return clock.reached(self.at)

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) / 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: clock.lead(cycles / 2000))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.synchronize())
    on_device = clock_of(torch.device("cuda"))
    assert on_device.cycles_per_microsecond == pytest.approx(2000)
    assert time_of(Timer(on_device, repeats=20), partial(clock.work, 500.0, 30.0)) == pytest.approx(THIRTY)


def test_a_call_that_waits_for_the_device_is_reported_with_its_gaps() -> None:
    clock = SimulatedClock()

    def waits() -> None:
        clock.work(1.0, 30.0)
        clock.synchronize()
        clock.work(100.0, 30.0)

    timing = time_of(Timer(clock, repeats=5), waits)
    assert not timing.queued and timing.median == pytest.approx(160.0)
    assert cell(timing).endswith("with gaps")


def test_a_sample_that_was_not_queued_in_time_is_left_out() -> None:
    clock = SimulatedClock()
    hosts = iter([1.0] * 30 + [1e6] * 7 + [1.0] * 1000)  # one sample with all retries
    timing = time_of(Timer(clock, warmups=2, repeats=50), lambda: clock.work(next(hosts), 30.0))
    assert timing == pytest.approx((30.0, 30.0, 30.0, 49, True))


def test_samples_that_were_not_queued_count_if_they_are_the_majority() -> None:
    late = [Sample(9.0, False)] * 2
    assert Timing.of_samples([Sample(1.0), *late]) == (9.0, 1.0, 9.0, 3, False)
    assert Timing.of_samples([Sample(1.0), Sample(2.0), *late]).samples == 2


def test_variants_take_turns_in_alternating_order_and_so_do_their_inputs() -> None:
    calls: list[str] = []
    variants = {name: [partial(calls.append, f"{name}{index}") for index in range(2)] for name in "ab"}
    Timer(SimulatedClock(), warmups=1, repeats=4).measure(variants)
    assert calls[-8:] == ["a0", "b0", "b1", "a1"] * 2


@pytest.mark.parametrize(("repeats", "expected"), [(1000, 3), (2, 2)])
def test_fewer_repeats_if_time_is_short(repeats: int, expected: int) -> None:
    calls: list[int] = []
    time_of(Timer(HostClock(), 1, repeats, min_repeats=3, seconds=0.0), partial(calls.append, 0))
    assert len(calls) == 1 + expected


def test_quantiles() -> None:
    assert Timing.of(range(100, -1, -1)) == (50, 10, 90, 101, True)


def test_inputs_are_enough_to_leave_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50e6))
    assert [num_inputs(size, torch.device("cuda")) for size in (1e3, 50e6, 150e6, 1e9)] == [8, 3, 1, 1]


def test_host_time_excludes_what_comes_before() -> None:
    calls: list[str] = []
    timer = Timer(HostClock(partial(calls.append, "wait")), warmups=2, repeats=3)
    timing = timer.host(partial(calls.append, "call"), partial(calls.append, "before"))
    assert timing.samples == 3 and [x for x in calls if x != "wait"] == ["before", "call"] * 5
    assert calls[-4:] == ["before", "wait", "call", "wait"]


def test_the_host_is_timed_with_the_queue_of_a_gpu_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    host_clock(torch.device("cuda")).synchronize()
    host_clock(torch.device("cpu")).synchronize()
    assert waits == [torch.device("cuda")]
