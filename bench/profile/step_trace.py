"""Times of the phases of a step from a trace of `torch.profiler`.

`rootfree_kernels.ranges` marks steps, batches and phases. On a GPU a kernel belongs to the phase that launched it. Its
time is that between its start and its end on the device, without the gap before it. On a CPU a phase takes as long as
the calling thread is in it.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]
Names = tuple[str, ...]
"""The ranges around something within a step, outermost first: () is the step itself, then a batch, then a phase."""

LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Step:
    """Microseconds of the host and of the device's kernels, and how many there were, by range."""

    host: Counter[Names] = field(default_factory=Counter)
    device: Counter[Names] = field(default_factory=Counter)
    kernels: Counter[Names] = field(default_factory=Counter)
    operators: Counter[Names] = field(default_factory=Counter)
    """Operators that call no other one."""

    def has(self, phase: str) -> bool:
        return any(names[1:] == (phase,) for names in self.host)


def read(path: Path) -> list[Event]:
    """Return the events of a trace that `export_chrome_trace` wrote."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        events: list[Event] = json.load(file)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def steps(events: Iterable[Event], name: str) -> list[Step]:
    """Return all steps, whose range is called `name`, in the order of time."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    on_device: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event["cat"] in ON_DEVICE:
            on_device[event["args"].get("correlation")].append(event)
        elif event["cat"] in ("user_annotation", "cpu_op", *LAUNCHES):
            threads[event["pid"], event["tid"]].append(event)
    return [step for thread in threads.values() for step in _steps_of(thread, name, on_device)]


def _steps_of(thread: Iterable[Event], name: str, on_device: Mapping[Any, list[Event]]) -> Iterator[Step]:
    events = list(_nested(thread))
    callers = {id(_innermost(around, "cpu_op")) for event, around in events if event["cat"] == "cpu_op"}
    step = Step()
    for event, around in events:
        marks = [x["name"] for x in around if x["cat"] == "user_annotation"]
        if event["cat"] == "user_annotation" and event["name"] == name:
            yield (step := Step(Counter({(): event["dur"]})))
        elif name in marks and id(event) not in callers:
            _count(step, event, tuple(marks[marks.index(name) + 1 :]), on_device)


def _count(step: Step, event: Event, names: Names, on_device: Mapping[Any, list[Event]]) -> None:
    every = [names[:length] for length in range(len(names) + 1)]
    if event["cat"] == "user_annotation":
        step.host[(*names, event["name"])] += event["dur"]
    elif event["cat"] == "cpu_op":
        step.operators.update(every)
    else:
        for kernel in on_device.get(event["args"].get("correlation"), ()):
            step.kernels.update(every)
            step.device.update(dict.fromkeys(every, kernel["dur"]))


def _innermost(around: Iterable[Event], category: str) -> Event | None:
    return next((event for event in reversed([*around]) if event["cat"] == category), None)


def _nested(thread: Iterable[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Yield the events of a thread in the order of time, each with those around it, outermost first."""
    around: list[Event] = []
    for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
        while around and event["ts"] >= around[-1]["ts"] + around[-1]["dur"]:
            around.pop()
        yield event, list(around)
        around.append(event)
