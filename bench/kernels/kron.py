"""The update of the factors and the preconditioned step: against the limits of the device and the eager backend; and
every launch by itself, so that the one furthest from its limit shows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.common.gpt2 import (
    Work,
    least_step,
    least_update,
    random_tensors,
    row_sum_stages,
    step_stages,
    total,
    update_stages,
)
from bench.common.report import Alternatives, Row, Target
from bench.common.timing import Measured, Timing, num_inputs
from bench.kernels.cases import Case, Context, check, poisoned_memory, ratio, require
from rootfree_kernels import ops
from rootfree_kernels.arguments import (
    Draws,
    FactorOptions,
    Factors,
    Gathered,
    Preconditioner,
    StepOptions,
    Tiling,
    Weights,
)
from rootfree_kernels.backend import Backend
from rootfree_kernels.blocks import Tile

UPDATE, STEP, LAUNCHES = "Factor update", "Preconditioned step", "Launches"
ROW_SUMS = ", row sums"
"""What is added to the name of a case whose clip is by row sums."""

NOTES = {
    UPDATE: "Gather and update with P_C and P_K; at T = 1 with the step behind it, for which the eager backend does "
    "without P_C and P_K. With row sums: clipped by the largest row sum instead of the Frobenius norm, which takes one "
    "launch more. Of roofline: max(bytes / copy bandwidth, operations / 8192³ rate) "
    "over the time, bytes being those of the launches, each reading its inputs and writing its outputs once; of least "
    "bytes: gradient and state alone, nothing between launches.",
    STEP: "Gather and step, P_C and P_K kept, FP32 gradients, weights and momentum buffers. Columns as above.",
    LAUNCHES: "Each launch between events of its own, which add a microsecond or two. Of limit: the larger of its "
    "bytes over the copy bandwidth and its operations over the 8192³ rate, over its time. Where most µs are above the "
    "limit, there is most to gain.",
}

SMALLEST_WITH_TARGET = 768
"""Side of blocks; smaller ones are measured for dispatch tables."""

UPDATE_STAGES = {
    "kron_gather_kernel": "gather",
    "bmm": "CᵀG",
    "bmm 2": "·K",
    "kron_momentum_kernel": "momentum",
    "kron_norms_kernel": "norms",
    "kron_factor_kernel": "factor",
    "kron_products_kernel": "products",
}
STEP_STAGES = {"kron_gather_kernel": "gather", "bmm": "P_C·G", "kron_step_kernel": "step"}
"""Which launch does what; a launch that is not here is shown by its own name, without a limit."""

BATCH_SIZE, BETA2, ALPHA2, DAMPING, GAMMA = 16.0, 0.2, 0.5, 1e-4, 1.0


class Blocks:
    """L blocks of p × d in BF16, or FP64 as the reference: the factors' state, and a weight and a gradient each."""

    def __init__(
        self, count: int, p: int, d: int, device: torch.device, seed: int = 0, clip: str = "frobenius"
    ) -> None:
        self.count, self.p, self.d, self.device, self.clip = count, p, d, device, clip
        self.weights, self.buffers, self.grads = (
            random_tensors([(p, d)] * count, device, scale=scale, seed=seed + index)
            for index, scale in enumerate((0.02, 0.1, 0.3))
        )
        self.c, self.k = (near_identity(count, n, device, seed + 3 + n) for n in (p, d))
        self.m_c, self.m_k = (_symmetric(count, n, device, 0.01, seed + 4 + n) for n in (p, d))
        self.p_c, self.p_k = torch.bmm(self.c, self.c.mT), torch.bmm(self.k, self.k.mT)
        self.tiles = [*Tile.single(p, d).as_ints] * count
        self.skipped = torch.zeros(count, dtype=torch.int32, device=device)
        self.seeds = torch.arange(count, dtype=torch.int32, device=device)
        self.steps = torch.zeros(count, device=device)
        self.lr = torch.tensor(1e-4, dtype=torch.float64)
        self.dtype = torch.bfloat16

    def state(self) -> list[Tensor]:
        return [self.c, self.k, self.m_c, self.m_k, self.p_c, self.p_k]

    def in_double(self) -> Blocks:
        """The same numbers in FP64."""
        other = object.__new__(Blocks)
        for name, x in vars(self).items():
            if isinstance(x, list) and isinstance(x[0], Tensor):
                x = [y.double() for y in x]
            elif isinstance(x, Tensor):
                x = x.double() if x.is_floating_point() else x.clone()
            setattr(other, name, x)
        other.dtype = torch.float64
        return other

    def gather(self, backend: Backend, factors: list[Tensor]) -> Gathered:
        tiling = Tiling(self.tiles, self.p, self.d)
        return ops.kron_gather(self.grads, tiling, factors, None, self.dtype, False, backend)

    def update(self, backend: Backend) -> Tensor:
        """Gather and one update of the factors, their products made; `ok` [L]."""
        return self._factor(backend, True, self.gather(backend, [self.c, self.k]))

    def step(self, backend: Backend) -> None:
        """Gather and a step with the products that are kept."""
        self._weight(backend, Preconditioner(self.p_c, self.p_k, True, None), self.gather(backend, []))

    def update_and_step(self, backend: Backend) -> None:
        """A step at T = 1: gather, update and step; whether products are made on the way is the backend's to say."""
        made, gathered = backend.makes_products, self.gather(backend, [self.c, self.k])
        ok = self._factor(backend, made, gathered)
        factors = (self.p_c, self.p_k) if made else (self.c, self.k)
        self._weight(backend, Preconditioner(*factors, made, ok), gathered)

    def _factor(self, backend: Backend, with_products: bool, gathered: Gathered) -> Tensor:
        products = (self.p_c, self.p_k) if with_products else (None, None)
        factors = Factors(self.c, self.k, self.m_c, self.m_k, None, None, *products)
        options = FactorOptions(BATCH_SIZE, BETA2, ALPHA2, DAMPING, GAMMA, self.clip, "stochastic")
        return ops.kron_factor(factors, gathered, Draws(self.seeds, self.steps), None, options, backend)

    def _weight(self, backend: Backend, preconditioner: Preconditioner, gathered: Gathered) -> None:
        weights = Weights(self.weights, self.buffers, [], self.tiles, self.skipped)
        draws, options = Draws(self.seeds, self.steps), StepOptions(0.9, 0.01, False, "stochastic")
        ops.kron_step(weights, preconditioner, gathered, self.lr, draws, None, options, backend)

    def bytes(self) -> int:
        tensors = [*self.weights, *self.buffers, *self.grads, *self.state()]
        return sum(x.numel() * x.element_size() for x in tensors)


def near_identity(count: int, n: int, device: torch.device, seed: int) -> Tensor:
    (x,) = random_tensors([(count, n, n)], device, scale=0.1 / n**0.5, seed=seed)
    return (x + torch.eye(n, device=device)).bfloat16()


def _symmetric(count: int, n: int, device: torch.device, scale: float, seed: int) -> Tensor:
    (x,) = random_tensors([(count, n, n)], device, scale=scale / n**0.5, seed=seed)
    return (x + x.mT).bfloat16()


# ---- checks ------------------------------------------------------------------------------------------------------


def check_update(count: int, p: int, d: int, context: Context, clip: str = "frobenius") -> None:
    """At most two blocks against FP64, in poisoned memory; products are symmetric to the bit."""
    blocks = Blocks(min(count, 2), p, d, context.device, clip=clip)
    expected = blocks.in_double()
    expected.update(context.eager)
    with poisoned_memory():
        ok = blocks.update(context.backend)
    require(bool(ok.all()), "a block was skipped that is finite")
    names = ("C", "K", "m_C", "m_K", "P_C", "P_K")
    for name, x, y in zip(names, blocks.state(), expected.state(), strict=True):
        check(f"{name} of {p} × {d}", [x], [y])
    check_symmetric([blocks.m_c, blocks.m_k, blocks.p_c, blocks.p_k])


def check_step(count: int, p: int, d: int, context: Context, method: str = "step") -> None:
    """A method of at most two blocks against FP64; a learning rate of 1 makes the step as large as the weights."""
    blocks = Blocks(min(count, 2), p, d, context.device)
    blocks.lr = torch.ones((), dtype=torch.float64)
    expected = blocks.in_double()
    getattr(expected, method)(context.eager)
    with poisoned_memory():
        getattr(blocks, method)(context.backend)
    for name, x, y in (("W", blocks.weights, expected.weights), ("buffer", blocks.buffers, expected.buffers)):
        check(f"{name} of {p} × {d}", x, y, torch.bfloat16)  # FP32 numbers that are made of BF16 products
    require(not bool(blocks.skipped.any()), "a block was skipped that is finite")


def check_symmetric(tensors: list[Tensor]) -> None:
    require(all(torch.equal(x, x.mT) for x in tensors), "a symmetric result is not symmetric")


# ---- updates and steps -------------------------------------------------------------------------------------------


def update_rows(count: int, p: int, d: int, context: Context) -> list[Row]:
    """An update: whole, against the eager backend, and launch by launch."""
    check_update(count, p, d, context)
    stages, least = update_stages(p, d), least_update(p, d) * count
    target = Target("≥", 0.7 if p >= 4096 else 0.6) if p >= SMALLEST_WITH_TARGET else None
    return _block_rows(UPDATE, "update", (count, p, d), (stages, least), UPDATE_STAGES, target, context)


def row_sum_rows(count: int, p: int, d: int, context: Context) -> list[Row]:
    """Rows of an update with clip="row_sum", likewise; dispatch tables go by those of the other clip."""
    check_update(count, p, d, context, "row_sum")
    work = row_sum_stages(p, d), least_update(p, d) * count
    rows = _block_rows(UPDATE, "update", (count, p, d), work, UPDATE_STAGES, None, context, "row_sum")
    rows[0].alternatives = None
    return rows


def step_rows(count: int, p: int, d: int, context: Context) -> list[Row]:
    """A step, likewise."""
    check_step(count, p, d, context)
    work = step_stages(p, d), least_step(p, d) * count
    return _block_rows(STEP, "step", (count, p, d), work, STEP_STAGES, None, context)


def together_rows(count: int, p: int, d: int, context: Context) -> list[Row]:
    """A step at T = 1, against the eager backend."""
    check_step(count, p, d, context, "update_and_step")
    times = _times("update_and_step", _sets(count, p, d, context), context)
    ours, eagerly = times.values()
    cells = {"µs": ours, "eager µs": eagerly, "eager / ours": ratio(eagerly, ours)}
    return [Row(UPDATE, f"{count} × {p}×{d}, T = 1", cells, alternatives=_alternatives(count, p, d, times))]


def _sets(count: int, p: int, d: int, context: Context, clip: str = "frobenius") -> list[Blocks]:
    """The same blocks with other numbers, as many as the cache asks for."""
    first = Blocks(count, p, d, context.device, clip=clip)
    sets = num_inputs(first.bytes(), context.device)
    return [first, *(Blocks(count, p, d, context.device, 10 * index, clip) for index in range(1, sets))]


def _times(method: str, every: list[Blocks], context: Context) -> dict[str, Timing]:
    """Times of a method by our kernels and by the eager backend, which take turns."""
    backends = context.backend, context.eager
    calls = {backend.name: [partial(getattr(x, method), backend) for x in every] for backend in backends}
    return {name: measured.total for name, measured in context.timer.measure(calls).items()}


def _alternatives(count: int, p: int, d: int, times: dict[str, Timing]) -> Alternatives:
    return Alternatives("matrices", {"side": max(p, d), "blocks": count}, times)


def _block_rows(
    table: str,
    method: str,
    shape: tuple[int, int, int],
    work: tuple[Mapping[str, Work], Work],
    labels: Mapping[str, str],
    target: Target | None,
    context: Context,
    clip: str = "frobenius",
) -> list[Row]:
    """Rows of `Blocks.update` or `Blocks.step` on L blocks; `work` is that of a block's launches, and the least."""
    name, (stages, least) = f"{shape[0]} × {shape[1]}×{shape[2]}{ROW_SUMS if clip == 'row_sum' else ''}", work
    every = _sets(*shape, context, clip)
    times = _times(method, every, context)
    ours, eagerly = times.values()
    done = total(stages) * shape[0]
    cells: dict[str, Any] = {
        "µs": ours,
        "of roofline": context.fraction(done, ours),
        "of least bytes": context.fraction(least, ours),
        "TFLOP/s": done.flops / ours.median / 1e6,
        "eager µs": eagerly,
        "eager / ours": ratio(eagerly, ours),
    }
    calls = [partial(getattr(x, method), context.backend) for x in every]
    parts = context.timer.measure({"ours": calls}, stages=True)["ours"]
    targets = {"of roofline": target} if target else {}
    row = Row(table, name, cells, targets, alternatives=_alternatives(*shape, times))
    return [row, *_launch_rows(f"{name} {method}", shape[0], stages, labels, parts, context)]


def _launch_rows(
    name: str, count: int, work: Mapping[str, Work], labels: Mapping[str, str], measured: Measured, context: Context
) -> list[Row]:
    rows = []
    for launch, timing in measured.stages.items():
        label = labels.get(launch, launch)
        cells: dict[str, Any] = {"µs": timing, "share": timing.median / measured.total.median}
        if label in work:
            fraction = context.fraction(work[label] * count, timing)
            cells["of limit"] = fraction
            cells["µs above limit"] = None if fraction is None else timing.median * (1 - fraction)
            cells["MB"], cells["GFLOP"] = work[label].bytes * count / 1e6, work[label].flops * count / 1e9
        rows.append(Row(LAUNCHES, f"{name}: {label}", cells))
    return rows


def block_cases(context: Context) -> list[Case]:
    cases = []
    for table, rows, more in ((UPDATE, update_rows, ""), (STEP, step_rows, ""), (UPDATE, together_rows, ", T = 1")):
        for count, p, d in context.sizes.blocks:
            cases.append(Case(table, f"{count} × {p}×{d}{more}", partial(rows, count, p, d, context)))
    for count, p, d in context.sizes.row_sum_blocks:
        cases.append(Case(UPDATE, f"{count} × {p}×{d}{ROW_SUMS}", partial(row_sum_rows, count, p, d, context)))
    return cases
