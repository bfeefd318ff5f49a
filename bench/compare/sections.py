"""The sections of a run: the roofline, steps, training and scaling, cut into pieces that are measured one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import roofline
from bench.common.memory import release, state_bytes
from bench.common.optimizers import ENTRIES, Entry
from bench.common.record import write_json
from bench.common.restarts import Progress
from bench.common.timing import Timer, clock_of
from bench.common.workloads import Workload
from bench.compare import scaling, training
from bench.compare.alternatives import alternatives, backend_of
from bench.compare.contest import OTHER, UPDATE, Case, Contestant, Gradients, cases_of, run_contest
from bench.compare.settings import Plan
from bench.compare.targets import DEFAULT
from bench.compare.work import work_of
from rootfree_kernels.eager import cpu_matmul_dtype

Piece = Callable[[], None]
Row = dict[str, Any]


@dataclass
class Run:
    """A record in the making."""

    folder: Path
    device: torch.device
    plan: Plan
    deadline: float
    record: dict[str, Any]
    entries: list[Entry]
    """Those that were chosen and can take part."""

    progress: Progress
    """What this process and those before it have done."""

    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.clock = clock_of(self.device)

    def save(self) -> None:
        self.record["seconds"] = time.perf_counter() - self.started
        write_json(self.folder / "results.json", self.record)


def pieces_of(run: Run, workloads: Sequence[Workload], sections: Sequence[str]) -> dict[str, Piece]:
    """Return the pieces of a run by name: the roofline, the steps of the first workload, then everything else."""
    steps = {f"steps, {workload.name}": partial(measure_steps, run, workload) for workload in workloads}
    if "steps" not in sections:
        steps = {}
    first = dict(list(steps.items())[:1])
    pieces: dict[str, Piece] = {"roofline": partial(measure_roofline, run), **first}
    if "training" in sections:
        pieces |= training_pieces(run)
    if "scaling" in sections:
        pieces |= scaling_pieces(run)
    return pieces | steps


def measure_roofline(run: Run) -> None:
    timer = Timer(run.clock, warmups=2, repeats=10, min_repeats=3, seconds=3.0)
    run.record["roofline"] = asdict(roofline.measure(timer, run.device, run.plan.copied, run.plan.product))


# ---- steps -------------------------------------------------------------------------------------------------------


def measure_steps(run: Run, workload: Workload) -> None:
    """Measure every entry on a workload. The contestants of a round share the memory of the device."""
    record, excluded = run.record, run.progress.excluded
    record["workloads"][workload.name] = {
        "num_matrices": len(workload.shapes),
        "num_weights": workload.num_weights,
        "longest_side": workload.longest_side,
    }
    for part, column in (("steps", "workload"), ("rows", "case")):  # a process that ended may have left some
        record[part] = [row for row in record[part] if row[column].partition(", ")[0] != workload.name]
    cases = [case for entry in run.entries for case in cases_of(entry, workload, run.device)]
    left_out = [case for case in cases if case.title in excluded]
    record["steps"] += [{**_about(case), "round": 0, "error": excluded[case.title]} for case in left_out]
    gradients = Gradients(workload.num_weights, run.device)
    wanted = [case for case in cases if case not in left_out]
    for number, round_ in enumerate(rounds(wanted, workload, run.device, run.plan.budget)):
        rows = measure_round(run, gradients, round_)
        record["steps"] += [row | {"round": number} for row in rows]
        record["rows"] += alternatives(workload, rows)
        run.save()
        release()


def rounds(wanted: Sequence[Case], workload: Workload, device: torch.device, budget: float) -> Iterator[Sequence[Case]]:
    """Yield the cases whose weights and state fit into the memory together, with our default in each round."""
    if device.type != "cuda":
        yield wanted
        return
    free = torch.cuda.mem_get_info(device)[0] * budget
    size = max(2, int(free / (workload.num_weights * 40)))  # 4 bytes of weights, up to 36 of state and scratch
    reference = [case for case in wanted if case.entry.name == DEFAULT][:1]
    rest = [case for case in wanted if case not in reference]
    for start in range(0, max(len(rest), 1), size - 1):
        yield [*reference, *rest[start : start + size - 1]]


def measure_round(run: Run, gradients: Gradients, cases: Sequence[Case]) -> list[Row]:
    """Return the rows of cases that take turns, with figures or an error each."""
    contestants = [Contestant(case, gradients, run.clock, run.device) for case in cases]

    def on_turn(contestant: Contestant) -> None:
        if run.device.type == "cuda":
            run.progress.focus(contestant.case.title)

    problems = run_contest(contestants, run.plan.limits, run.deadline, on_turn)
    rows = []
    for number, contestant in enumerate(contestants):
        try:
            found = {"error": problems[number]} if number in problems else _figures(run, contestant)
        except Exception as error:  # of any kind: it is recorded, and the others go on
            found = {"error": f"{type(error).__name__}: {error}"}
        rows.append({**_about(contestant.case), **found})
    return rows


def _about(case: Case) -> Row:
    about = {"workload": case.workload.name, "optimizer": case.entry.name, "block": case.block}
    return {**about, "uncut": case.is_uncut}


def _figures(run: Run, contestant: Contestant) -> Row:
    """Return the figures of a contestant, with its fractions of the roofline."""
    entry, workload, block = contestant.case
    figures = contestant.measured()
    roof = run.record["roofline"]
    for kind in (UPDATE, OTHER):
        if roof and (found := work_of(entry, workload, block, kind)):
            work, dtype = found[0], cpu_matmul_dtype(found[1], run.device)
            figures[f"roofline of {kind}"] = roofline.Roofline(**roof).limit(work, dtype) / figures[kind]["median"]
    if entry.is_ours:
        figures["backend"] = backend_of(contestant.optimizer)
    if entry.is_ours and entry.has_period:
        optimizer = entry.make(contestant.params, 1, block)
        optimizer.step()
        figures["state_bytes at T = 1"] = state_bytes(optimizer, contestant.params) / workload.num_weights
    return figures


# ---- training and scaling ----------------------------------------------------------------------------------------


def training_pieces(run: Run) -> dict[str, Piece]:
    """Return a piece for each optimizer on a GPU, where it trains alone. On a CPU all take turns in one piece."""
    names = training.names_of(run.device, run.entries)
    title = f"training, {run.plan.task.name}"
    if run.device.type == "cuda":
        return {f"{title}, {name}": partial(measure_training, run, [name]) for name in names}
    return {title: partial(measure_training, run, names)}


def measure_training(run: Run, names: Sequence[str]) -> None:
    plan = run.plan
    rows = training.measure(plan.task, run.clock, run.device, names, plan.training_cycles, run.deadline)
    run.record["training"] += rows


def scaling_pieces(run: Run) -> dict[str, Piece]:
    plan = run.plan
    widths, layers = scaling.widths(plan.widths), scaling.layers(plan.layer_counts, plan.layer_side)
    pieces = {
        "scaling, width": partial(measure_scaling, run, "width", widths),
        "scaling, layers": partial(measure_scaling, run, "layers", layers),
    }
    return {**pieces, "scaling, T": partial(measure_periods, run)} if ENTRIES[DEFAULT] in run.entries else pieces


def measure_scaling(run: Run, of: str, sizes: Sequence[tuple[int, Workload]]) -> None:
    """Measure the series over widths or numbers of layers."""
    entries = [entry for entry in run.entries if entry.name in scaling.SERIES]
    limits = run.plan.scaling_limits
    run.record["scaling"][of] = scaling.measure(sizes, entries, run.clock, run.device, limits, run.deadline)


def measure_periods(run: Run) -> None:
    weight = Workload("square", ((run.plan.period_side,) * 2,))
    run.record["scaling"]["T"] = scaling.periods(run.plan.periods, weight, run.clock, run.device, 3, run.deadline)
