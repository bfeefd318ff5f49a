"""How the cost of a step grows with the width of a weight, with the number of layers, and with T.

The exponents are the slopes of log time over log size by least squares, over the larger half of the sizes, where what a
call costs by itself no longer counts; the theory is that of the multiplications: an update of n × n is 18n³, another
step 4n³, a diagonal step n² numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from bench.common.optimizers import ENTRIES, WHOLE, Entry
from bench.common.timing import Timing
from bench.common.workloads import Workload
from bench.compare.contest import OTHER, UPDATE, Contestant, Gradients, Limits, release, run_contest, shapes_for

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
"""µs of an update above which a series is not followed to the next size, where it takes up to eight times as long."""


def series(device: torch.device, missing: Iterable[str]) -> list[Entry]:
    """The entries that are followed where their package is at hand."""
    chosen = [ENTRIES[name] for name in SERIES]
    return [entry for entry in chosen if entry.peer not in missing and device.type in entry.devices]


def measure(
    sizes: Sequence[tuple[int, Workload]],
    entries: Sequence[Entry],
    clock: Any,
    device: torch.device,
    limits: Limits,
    deadline: float,
) -> list[dict[str, Any]]:
    """A row for each size and entry: {"size", "optimizer", "update", "other"}, times in µs."""
    rows: list[dict[str, Any]] = []
    going = list(entries)
    for size, workload in sizes:
        gradients = Gradients(workload.num_weights, device)
        contestants = [
            Contestant(entry, WHOLE, shapes_for(entry, workload, WHOLE), gradients, clock, device) for entry in going
        ]
        problems = run_contest(contestants, limits, deadline)
        for number, contestant in enumerate(contestants):
            row: dict[str, Any] = {"size": size, "optimizer": contestant.entry.name}
            if number in problems:
                row["error"] = problems[number]
            else:
                row |= {kind: timing._asdict() for kind, timing in contestant.timings().items()}
            rows.append(row)
        going = [entry for entry in going if _longest(rows, entry.name) < TOO_LONG]
        del contestants, gradients
        release()
    return rows


def _longest(rows: list[dict[str, Any]], name: str) -> float:
    """µs of the last update of an entry; infinite where it could not be measured."""
    last = [row for row in rows if row["optimizer"] == name][-1]
    return math.inf if "error" in last else float(last[UPDATE]["median"])


def widths(sides: Iterable[int]) -> list[tuple[int, Workload]]:
    return [(side, Workload(f"{side}²", ((side, side),))) for side in sides]


def layers(counts: Iterable[int], side: int) -> list[tuple[int, Workload]]:
    return [(count, Workload(f"{count} × {side}²", ((side, side),) * count)) for count in counts]


def exponent(rows: Iterable[dict[str, Any]], optimizer: str, kind: str) -> float | None:
    """The slope of log time over log size over the larger half of the sizes; None with fewer than three of them."""
    found = [(row["size"], row[kind]["median"]) for row in rows if row["optimizer"] == optimizer and kind in row]
    found = sorted(found)[-max(3, (len(found) + 1) // 2) :]
    if len(found) < 3:
        return None
    xs, ys = ([math.log(pair[axis]) for pair in found] for axis in (0, 1))
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return slope / sum((x - mean_x) ** 2 for x in xs)


def theory(optimizer: str, kind: str, of: str) -> float:
    """The exponent by the count of operations: in width 3, of a diagonal step 2; in layers 1."""
    if of == "layers":
        return 1.0
    return 2.0 if ENTRIES[optimizer].family == "diagonal" else 3.0


def periods(
    wanted: Sequence[int], workload: Workload, clock: Any, device: torch.device, cycles: int, deadline: float
) -> list[dict[str, Any]]:
    """The mean step of IFShampoo at each T, beside (update + (T−1)·other)/T of the steps at the largest T."""
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
    """µs of the steps of some cycles of T, after two, the update first; whether all were queued."""
    gradients = Gradients(workload.num_weights, device)
    contestant = Contestant(ENTRIES["IFShampoo"], 1024, workload.shapes, gradients, clock, device, period=T)
    contestant.prepare()
    for _ in range(cycles * T):
        contestant.sample()
    updates, others = (contestant.times[kind] for kind in (UPDATE, OTHER))
    found = [[update, *others[n * (T - 1) : (n + 1) * (T - 1)]] for n, update in enumerate(updates)]
    return found, all(flag for flags in contestant.queued.values() for flag in flags)
