"""The phases of a step: the work of each, and tables of how fast it was done.

Operations and bytes are those of `bench.common.roofline`: each launch reads its inputs and writes its outputs once, and
products are counted as the backend takes them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from bench.common.report import Row, number, section
from bench.common.roofline import Roofline, Work, diagonal_bytes, step_stages, update_stages
from bench.common.timing import Timing
from bench.profile.step_trace import Names, Step
from rootfree_kernels.optim.report import BatchReport, step_reports

MULTIPLIED = (torch.float32, torch.bfloat16)
"""The dtypes of products whose rate is measured."""

UPDATE, OTHER, ANY = "Steps with an update of the factors", "Steps without", "Steps"


@dataclass(frozen=True)
class Task:
    """The work of a phase, and the dtype of its products."""

    work: Work
    dtype: torch.dtype

    def __add__(self, other: Task) -> Task:
        return Task(self.work + other.work, self.dtype if self.work.flops else other.dtype)


# ---- work ----------------------------------------------------------------------------------------------------------


def tasks_of(optimizer: Optimizer) -> dict[bool, dict[Names, Task]]:
    """Return the work of the phases of a step with (True) and without an update, by batch and phase.

    The optimizer has one group on one device. Kinds of steps that it has not taken yet are missing.
    """
    found: dict[bool, dict[Names, Task]] = {}
    for batches in step_reports(optimizer):
        tasks = found[any(batch.updates_factors for batch in batches)] = {}
        for batch in batches:
            for phase, task in (_matrices(batch) if batch.block_shape else _diagonal(batch)).items():
                names = (batch.label, phase)
                tasks[names] = tasks[names] + task if names in tasks else task
    return found


def _diagonal(batch: BatchReport) -> dict[str, Task]:
    kinds = (batch.params[0].dtype, batch.grad_dtype, batch.state_dtype)
    work = Work(0, diagonal_bytes(*kinds) * sum(param.numel() for param in batch.params))
    return {"apply": Task(work, torch.float32)}


def _matrices(batch: BatchReport) -> dict[str, Task]:
    """Return the work of a batch's phases. Some kernels take the second product of a step together with the step."""
    assert batch.block_shape is not None and batch.matmul_dtype is not None
    (p, d), dtype = batch.block_shape, batch.matmul_dtype
    size, grad_bytes = dtype.itemsize, batch.grad_dtype.itemsize
    update = update_stages(p, d, grad_bytes, size)
    step = step_stages(p, d, grad_bytes, batch.params[0].element_size(), size)
    second = Work(2 * d * p * d, size * (2 * p * d + d * d))
    if batch.backend.fuses_last_product:
        phases = {"precondition": step["P_C·G"], "apply": step["step"]}
    else:
        both = (step["P_C·G"] + second) * (1 if batch.computes_products else 2)  # without P_C and P_K four products
        rest = Work(0, step["step"].bytes - size * d * d)  # U is read in the place of X
        phases = {"precondition": both, "apply": rest, "precondition and apply": both + rest}
    phases["gather"] = (update if batch.updates_factors else step)["gather"]
    if batch.updates_factors:
        stages = ["CᵀG", "·K", "momentum", "factor", *(["products"] if batch.computes_products else [])]
        phases["factor update"] = sum((update[stage] for stage in stages), Work())
    return {phase: Task(work * batch.num_blocks, dtype) for phase, work in phases.items()}


# ---- tables --------------------------------------------------------------------------------------------------------


def rows_of(found: Sequence[Step], optimizer: Optimizer, roof: Roofline, on_device: bool) -> list[Row]:
    """Return the rows of a table for steps with an update and of one for steps without."""
    tasks, rows = tasks_of(optimizer), []
    for update in (True, False):
        some = [step for step in found if step.has("factor update") == update]
        if some:
            table = (UPDATE if update else OTHER) if some[0].has("gather") else ANY
            rows += [
                Row(table, _case(names), _cells(names, some, tasks[update], roof, on_device)) for names in some[-1].host
            ]
    return rows


def _case(names: Names) -> str:
    return " / ".join(names) or "whole step"


def _cells(
    names: Names, some: Sequence[Step], tasks: Mapping[Names, Task], roof: Roofline, on_device: bool
) -> dict[str, Any]:
    times, counts = ("device", "kernels") if on_device else ("host", "operators")
    timing = Timing.of([getattr(step, times)[names] for step in some])
    cells: dict[str, Any] = {"µs": timing}
    if on_device:
        cells["µs of the host"] = Timing.of([step.host[names] for step in some])
    cells[counts] = statistics.median_low(getattr(step, counts)[names] for step in some)
    within = [tasks[other] for other in some[-1].host if other in tasks and other[: len(names)] == names]
    return cells | (_speeds(sum(within[1:], within[0]), timing, roof) if within else {})


def _speeds(task: Task, timing: Timing, roof: Roofline) -> dict[str, Any]:
    seconds = max(timing.median, 1e-3) * 1e-6
    bandwidth, rate = task.work.bytes / seconds, task.work.flops / seconds
    cells = {"GB/s": bandwidth / 1e9, "of the copy": bandwidth / roof.bandwidth}
    if rate:
        cells |= {"TFLOP/s": rate / 1e12, "of the product": rate / roof.rate(task.dtype)}
    return cells


NOTES = {
    True: "µs: between start and end of each kernel on the device, added up, without the gaps before it; median of the "
    "steps (10th–90th percentile). µs of the host: in the range, profiler included.",
    False: "µs: of the calling thread in the range, profiler included; median of the steps (10th–90th percentile). "
    "Operators: of PyTorch, in the calling thread, those that call no other one.",
}
"""By whether kernels ran on a device."""

WORK = (
    "GB/s and TFLOP/s: bytes and operations of the launches (`bench/common/roofline.py`) over the time; beside them "
    "the fraction of what `copy_` and a matrix product of the same dtype reached in this run."
)


def markdown(record: Mapping[str, Any], rows: Sequence[Row], roof: Roofline, on_device: bool) -> str:
    """Return the page: the tables and their origin."""
    products = ", ".join(f"{number(roof.rate(dtype) / 1e12)} TFLOP/s in {dtype}" for dtype in MULTIPLIED)
    lines = [
        f"# {record['optimizer']}, {record['model']}, T = {record['frequency']}, on {record['device']}",
        "",
        f"`{record['command']}`, {record['date']}, commit {record['commit']}, torch {record['torch']}, "
        f"{record['threads']} threads; {record['steps']} steps.",
        f"This device copies {number(roof.bandwidth / 1e9)} GB/s (read and written) and multiplies {products}.",
        "",
        *(NOTES[on_device], WORK, ""),
    ]
    for table in dict.fromkeys(row.table for row in rows):
        lines += section(table, [row for row in rows if row.table == table], "")
    return "\n".join(lines)
