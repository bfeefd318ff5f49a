"""How the cost of a step grows with the width of a weight, with the number of layers, and with T.

An exponent is the slope of log time over log size by least squares, over the larger half of the sizes, where the
overhead of a call no longer counts. The theory counts operations: an update of n × n takes 18n³, another step 4n³, and
a diagonal step n² numbers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from bench.common.memory import release
from bench.common.optimizers import ENTRIES, Entry
from bench.common.timing import Timing
from bench.common.workloads import Workload
from bench.compare.contest import OTHER, UPDATE, Case, Contestant, Gradients, Limits, run_contest

SERIES = (
    "IFShampoo",
    "IFShampoo, FP32 factors",
    "RFRMSProp",
    "AdamW, fused",
    "Muon of torch",
    "Muon of Dion, Triton",
    "Distributed Shampoo, eigh, unpacked",
    "Distributed Shampoo, Newton, unpacked",
    "sirfshampoo",
    "SOAP",
)
TOO_LONG = 4e5
"""µs of an update above which a series ends: at the next size it would take up to eight times as long."""

Row = dict[str, Any]


def measure(
    sizes: Sequence[tuple[int, Workload]],
    entries: Sequence[Entry],
    clock: Any,
    device: torch.device,
    limits: Limits,
    deadline: float,
) -> list[Row]:
    """Return a row for each size and entry: {"size", "optimizer", "update", "other"} with times in µs."""
    rows: list[Row] = []
    going = list(entries)
    for size, workload in sizes:
        gradients = Gradients(workload.num_weights, device)
        contestants = [Contestant(Case(entry, workload), gradients, clock, device) for entry in going]
        problems = run_contest(contestants, limits, deadline)
        found = [
            {"error": problems[number]}
            if number in problems
            else {kind: timing._asdict() for kind, timing in contestant.timings().items()}
            for number, contestant in enumerate(contestants)
        ]
        rows += [{"size": size, "optimizer": x.name, **row} for x, row in zip(going, found, strict=True)]
        going = [x for x, row in zip(going, found, strict=True) if UPDATE in row and row[UPDATE]["median"] < TOO_LONG]
        del contestants, gradients
        release()
    return rows


def widths(sides: Iterable[int]) -> list[tuple[int, Workload]]:
    return [(side, Workload(f"{side}²", ((side, side),))) for side in sides]


def layers(counts: Iterable[int], side: int) -> list[tuple[int, Workload]]:
    return [(count, Workload(f"{count} × {side}²", ((side, side),) * count)) for count in counts]


def exponent(rows: Iterable[Row], optimizer: str, kind: str) -> float | None:
    """Return the slope over the larger half of an optimizer's sizes; None with fewer than three sizes."""
    found = sorted((row["size"], row[kind]["median"]) for row in rows if row["optimizer"] == optimizer and kind in row)
    logs = [(math.log(size), math.log(time)) for size, time in found[-max(3, (len(found) + 1) // 2) :]]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope if len(logs) >= 3 else None


def theory(optimizer: str, kind: str, of: str) -> float:
    """Return the exponent by the count of operations: in layers 1, in width 3 or, for a diagonal step, 2."""
    if of == "layers":
        return 1.0
    return 2.0 if ENTRIES[optimizer].family == "diagonal" else 3.0


def periods(
    wanted: Sequence[int], workload: Workload, clock: Any, device: torch.device, cycles: int, deadline: float
) -> list[Row]:
    """Return the mean step of IFShampoo at each T, and (update + (T−1)·other)/T of the steps at the largest T."""
    times = {T: _cycles(T, workload, clock, device, cycles) for T in wanted if time.perf_counter() < deadline}
    if not times or (longest := max(times)) == 1:
        return []
    update = Timing.of([cycle[0] for cycle in times[longest][0]]).median
    other = Timing.of([x for cycle in times[longest][0] for x in cycle[1:]]).median
    return [
        {
            "T": T,
            "measured": Timing.of([sum(cycle) / T for cycle in of_T], queued)._asdict(),
            "formula": (update + (T - 1) * other) / T,
        }
        for T, (of_T, queued) in times.items()
    ]


def _cycles(
    T: int, workload: Workload, clock: Any, device: torch.device, cycles: int
) -> tuple[list[list[float]], bool]:
    """Return the µs of the steps of some cycles of T, each with its update first, and whether all were queued."""
    case = Case(ENTRIES["IFShampoo"], workload, 1024)
    contestant = Contestant(case, Gradients(workload.num_weights, device), clock, device, period=T)
    contestant.prepare()
    for _ in range(cycles * T):
        contestant.sample()
    updates, others = ([sample.time for sample in contestant.samples[kind]] for kind in (UPDATE, OTHER))
    found = [[update, *others[n * (T - 1) : (n + 1) * (T - 1)]] for n, update in enumerate(updates)]
    return found, all(sample.queued for samples in contestant.samples.values() for sample in samples)
