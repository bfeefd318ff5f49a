"""The update of the factors and the preconditioned step, whole and launch by launch.

They are compared with the limits of the device and with the eager backend. The launch furthest from its limit has the
most to gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.common.report import Alternatives, Row, Target
from bench.common.roofline import Work, least_step_bytes, least_update_bytes, total
from bench.common.timing import Measured, Timing, num_inputs
from bench.kernels.blocks import PAPER, RECIPE, ROW_SUM, STEP, UPDATE, Blocks, Rule, Shape
from bench.kernels.cases import Case, Context, check, in_double, poisoned_memory, ratio, require

LAUNCHES = "Launches"

NOTES = {
    UPDATE: "Gather and update with P_C and P_K; at T = 1 with the step behind it, for which the eager backend does "
    "without P_C and P_K. With row sums: clipped by the largest row sum instead of the Frobenius norm, which takes one "
    "launch more. Of the recipe: whitened, with symmetric factors and no P_C and P_K. Of roofline: max(bytes / copy "
    "bandwidth, operations / 8192³ rate) over the time, bytes being those of the launches, each reading its inputs and "
    "writing its outputs once; of least bytes: gradient and state alone, nothing between launches.",
    STEP: "Gather and step, P_C and P_K kept, FP32 gradients, weights and momentum buffers. Of the recipe: with "
    "momentum of the gradient and an update of a fixed norm. Columns as above.",
    LAUNCHES: "Each launch between events of its own, which add a microsecond or two. Of limit: the larger of its "
    "bytes over the copy bandwidth and its operations over the 8192³ rate, over its time. Where most µs are above the "
    "limit, there is most to gain.",
}

SMALLEST_WITH_TARGET = 768
"""Side of blocks; smaller ones are measured for dispatch tables."""


# ---- checks --------------------------------------------------------------------------------------------------------


def check_update(shape: Shape, context: Context, rule: Rule = PAPER) -> None:
    """Check at most two blocks against FP64, in poisoned memory, and that what is symmetric is so to the bit."""
    blocks = Blocks((min(shape[0], 2), *shape[1:]), context.device, rule)
    expected = in_double(blocks)
    expected.update(context.eager)
    with poisoned_memory():
        ok = blocks.update(context.backend)
    require(bool(ok.all()), "a block was skipped that is finite")
    correct = expected.state()
    for name, x in blocks.state().items():
        check(f"{name} of {shape[1]} × {shape[2]}", [x], [correct[name]])
    factors = [blocks.c, blocks.k] if rule.is_whitened else [blocks.p_c, blocks.p_k]
    check_symmetric([blocks.m_c, blocks.m_k, *factors])


def check_step(shape: Shape, context: Context, rule: Rule = PAPER, method: str = "step") -> None:
    """Check a method of at most two blocks against FP64, with a step as large as the weights."""
    blocks = Blocks((min(shape[0], 2), *shape[1:]), context.device, rule)
    blocks.lr = torch.tensor(0.02 if rule.is_whitened else 1.0, dtype=torch.float64)
    expected = in_double(blocks)
    getattr(expected, method)(context.eager)
    with poisoned_memory():
        getattr(blocks, method)(context.backend)
    for name, x, y in (("W", blocks.weights, expected.weights), ("buffer", blocks.buffers, expected.buffers)):
        check(f"{name} of {shape[1]} × {shape[2]}", x, y, torch.bfloat16)  # FP32, but made of BF16 products
    require(not bool(blocks.skipped.any()), "a block was skipped that is finite")


def check_symmetric(tensors: list[Tensor]) -> None:
    require(all(torch.equal(x, x.mT) for x in tensors), "a symmetric result is not symmetric")


# ---- updates and steps ---------------------------------------------------------------------------------------------


def update_rows(shape: Shape, rule: Rule, context: Context) -> list[Row]:
    """Time an update: whole, against the eager backend, and launch by launch."""
    check_update(shape, context, rule)
    rows = _block_rows(UPDATE, shape, rule, context)
    if rule is PAPER and shape[1] >= SMALLEST_WITH_TARGET:
        rows[0].targets["of roofline"] = Target("≥", 0.7 if shape[1] >= 4096 else 0.6)
    return rows


def step_rows(shape: Shape, rule: Rule, context: Context) -> list[Row]:
    """Time a step, likewise."""
    check_step(shape, context, rule)
    return _block_rows(STEP, shape, rule, context)


def together_rows(shape: Shape, rule: Rule, context: Context) -> list[Row]:
    """Time a step at T = 1 against the eager backend."""
    check_step(shape, context, rule, "update_and_step")
    times = _times("update_and_step", _sets(shape, rule, context), context)
    ours, eagerly = times.values()
    cells = {"µs": ours, "eager µs": eagerly, "eager / ours": ratio(eagerly, ours)}
    name = f"{_name(shape)}{rule.suffix}, T = 1"
    return [Row(UPDATE, name, cells, alternatives=_alternatives(shape, rule, times))]


def _name(shape: Shape) -> str:
    return f"{shape[0]} × {shape[1]}×{shape[2]}"


def _sets(shape: Shape, rule: Rule, context: Context) -> list[Blocks]:
    """Return the same blocks with different numbers, as many as the cache asks for."""
    first = Blocks(shape, context.device, rule)
    sets = num_inputs(first.bytes(), context.device)
    return [first, *(Blocks(shape, context.device, rule, 10 * index) for index in range(1, sets))]


def _times(method: str, every: list[Blocks], context: Context) -> dict[str, Timing]:
    """Return the times of a method by our kernels and by the eager backend, which take turns."""
    backends = context.backend, context.eager
    calls = {backend.name: [partial(getattr(x, method), backend) for x in every] for backend in backends}
    return {name: measured.total for name, measured in context.timer.measure(calls).items()}


def _alternatives(shape: Shape, rule: Rule, times: dict[str, Timing]) -> Alternatives | None:
    """Return the times for dispatch tables, which go by the paper's rule alone."""
    sizes = {"side": max(shape[1:]), "blocks": shape[0]}
    return Alternatives("matrices", sizes, times) if rule is PAPER else None


def _block_rows(table: str, shape: Shape, rule: Rule, context: Context) -> list[Row]:
    """Return the rows of `Blocks.update` or `Blocks.step`: the whole, and every launch."""
    count, sides = shape[0], shape[1:]
    if table == UPDATE:
        method, stages, least = "update", rule.update_stages(*sides), least_update_bytes(*sides, not rule.is_whitened)
    else:
        method, stages, least = "step", rule.step_stages(*sides), least_step_bytes(*sides)
    every, name = _sets(shape, rule, context), f"{_name(shape)}{rule.suffix}"
    times = _times(method, every, context)
    ours, eagerly = times.values()
    done = total(stages) * count
    cells: dict[str, Any] = {
        "µs": ours,
        "of roofline": context.fraction(done, ours),
        "of least bytes": context.fraction(Work(done.flops, least * count), ours),
        "TFLOP/s": done.flops / ours.median / 1e6,
        "eager µs": eagerly,
        "eager / ours": ratio(eagerly, ours),
    }
    row = Row(table, name, cells, alternatives=_alternatives(shape, rule, times))
    calls = [partial(getattr(x, method), context.backend) for x in every]
    measured = context.timer.measure({"ours": calls}, stages=True)["ours"]
    work = {label: each * count for label, each in stages.items()}
    return [row, *_launch_rows(f"{name} {method}", work, rule.launches[table], measured, context)]


def _launch_rows(
    name: str, work: Mapping[str, Work], labels: Mapping[str, str], measured: Measured, context: Context
) -> list[Row]:
    rows = []
    for launch, timing in measured.stages.items():
        label = labels.get(launch, launch)
        cells: dict[str, Any] = {"µs": timing, "share": timing.median / measured.total.median}
        if label in work:
            fraction = context.fraction(work[label], timing)
            cells["of limit"] = fraction
            cells["µs above limit"] = None if fraction is None else timing.median * (1 - fraction)
            cells["MB"], cells["GFLOP"] = work[label].bytes / 1e6, work[label].flops / 1e9
        rows.append(Row(LAUNCHES, f"{name}: {label}", cells))
    return rows


def block_cases(context: Context) -> list[Case]:
    blocks, others = context.sizes.blocks, context.sizes.other_blocks
    kinds = (
        (UPDATE, update_rows, "", PAPER, blocks),
        (STEP, step_rows, "", PAPER, blocks),
        (UPDATE, together_rows, ", T = 1", PAPER, blocks),
        (UPDATE, update_rows, "", RECIPE, others),
        (STEP, step_rows, "", RECIPE, others),
        (UPDATE, together_rows, ", T = 1", RECIPE, others),
        (UPDATE, update_rows, "", ROW_SUM, others),
    )
    return [
        Case(table, f"{_name(shape)}{rule.suffix}{more}", partial(rows, shape, rule, context))
        for table, rows, more, rule, shapes in kinds
        for shape in shapes
    ]
