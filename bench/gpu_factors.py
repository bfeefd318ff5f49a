"""Symmetric products, the update of the factors and the preconditioned step: against `torch.bmm`, the limits of the
device, and the eager backend; and every launch by itself, so that the one furthest from its limit shows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpt2 import Work, least_step, least_update, random_tensors, step_stages, total, update_stages
from bench.gpu_cases import Case, Context, check, poisoned_memory, ratio
from bench.gpu_report import Row, Target
from bench.gpu_timing import Measured, Timing, num_inputs
from rootfree_kernels import eager, ops
from rootfree_kernels.backends import implementation
from rootfree_kernels.blocks import Tile
from rootfree_kernels.eager.kron_factor import curvature_step

SYMMETRIC, UPDATE, STEP, LAUNCHES = "Symmetric products", "Factor update", "Preconditioned step", "Launches"

NOTES = {
    SYMMETRIC: "L products of either side: P = XXᵀ against `torch.bmm`, and the kernel of m against four products of "
    "`torch.bmm` with the element-wise operations behind them (the eager backend's). TFLOP/s count n³ a symmetric "
    "product, of rate: that over the 8192³ product's rate; a half is what `torch.bmm` could have at most.",
    UPDATE: "Gather and update with P_C and P_K. Of roofline: max(bytes / copy bandwidth, operations / 8192³ rate) "
    "over the time, bytes being those of the launches, each reading its inputs and writing its outputs once; of least "
    "bytes: gradient and state alone, nothing between launches.",
    STEP: "Gather and step, P_C and P_K kept, FP32 gradients, weights and momentum buffers. Columns as above.",
    LAUNCHES: "Each launch between events of its own, which add a microsecond or two. Of limit: the larger of its "
    "bytes over the copy bandwidth and its operations over the 8192³ rate, over its time. Where most µs are above the "
    "limit, there is most to gain.",
}

SYMMETRIC_TARGETS = {768: 1.15, 1024: 1.15, 2048: 1.3, 4096: 1.5}
UPDATE_STAGES = {
    "kron_gather_kernel": "gather",
    "bmm": "CᵀG",
    "bmm 2": "·K",
    "kron_momentum_kernel": "momentum",
    "kron_factor_kernel": "factor",
    "kron_products_kernel": "products",
}
STEP_STAGES = {"kron_gather_kernel": "gather", "bmm": "P_C·G", "kron_step_kernel": "step"}
"""Which launch does what; a launch that is not here is shown by its own name, without a limit."""

BATCH_SIZE, BETA2, ALPHA2, DAMPING, GAMMA = 16.0, 0.2, 0.5, 1e-4, 1.0


class Blocks:
    """L blocks of p × d in BF16, or FP64 as the reference: the factors' state, and a weight and a gradient each."""

    def __init__(self, count: int, p: int, d: int, device: torch.device, seed: int = 0) -> None:
        self.count, self.p, self.d, self.device = count, p, d, device
        self.weights, self.buffers, self.grads = (
            random_tensors([(p, d)] * count, device, scale=scale, seed=seed + index)
            for index, scale in enumerate((0.02, 0.1, 0.3))
        )
        self.c, self.k = (_near_identity(count, n, device, seed + 3 + n) for n in (p, d))
        self.m_c, self.m_k = (_symmetric(count, n, device, 0.01, seed + 4 + n) for n in (p, d))
        self.p_c, self.p_k = torch.bmm(self.c, self.c.mT), torch.bmm(self.k, self.k.mT)
        self.tiles = [*Tile.single(p, d).numbers] * count
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

    def gather(self, backend: str, factors: list[Tensor]) -> tuple[Tensor, Tensor]:
        return ops.kron_gather(self.grads, self.tiles, self.p, self.d, factors, None, self.dtype, False, backend)

    def update(self, backend: str) -> Tensor:
        """Gather and one update of the factors, their products made; `ok` [L]."""
        grad, squares = self.gather(backend, [self.c, self.k])
        state = [self.c, self.k, self.m_c, self.m_k, None, None, self.p_c, self.p_k]
        numbers = [BATCH_SIZE, BETA2, ALPHA2, DAMPING, GAMMA, "frobenius", "stochastic"]
        return ops.kron_factor(*state, grad, squares, self.seeds, self.steps, None, *numbers, backend)

    def step(self, backend: str) -> None:
        """Gather and a step with the products that are kept."""
        grad, squares = self.gather(backend, [])
        lists = [self.weights, self.buffers, [], self.tiles, self.skipped, self.p_c, self.p_k, grad, squares]
        draws = [self.seeds, self.steps, None, True]
        ops.kron_step(*lists, self.lr, None, *draws, 0.9, 0.01, False, "stochastic", backend)

    def bytes(self) -> int:
        tensors = [*self.weights, *self.buffers, *self.grads, *self.state()]
        return sum(x.numel() * x.element_size() for x in tensors)


def _near_identity(count: int, n: int, device: torch.device, seed: int) -> Tensor:
    (x,) = random_tensors([(count, n, n)], device, scale=0.1 / n**0.5, seed=seed)
    return (x + torch.eye(n, device=device)).bfloat16()


def _symmetric(count: int, n: int, device: torch.device, scale: float, seed: int) -> Tensor:
    (x,) = random_tensors([(count, n, n)], device, scale=scale / n**0.5, seed=seed)
    return (x + x.mT).bfloat16()


# ---- checks ------------------------------------------------------------------------------------------------------


def check_update(count: int, p: int, d: int, context: Context) -> None:
    """At most two blocks against FP64, in poisoned memory; products are symmetric to the bit."""
    blocks = Blocks(min(count, 2), p, d, context.device)
    expected = blocks.in_double()
    expected.update("eager")
    with poisoned_memory():
        ok = blocks.update(context.backend)
    if not bool(ok.all()):
        raise AssertionError("a block was skipped that is finite")
    names = ("C", "K", "m_C", "m_K", "P_C", "P_K")
    for name, x, y in zip(names, blocks.state(), expected.state(), strict=True):
        check(f"{name} of {p} × {d}", [x], [y])
    check_symmetric([blocks.m_c, blocks.m_k, blocks.p_c, blocks.p_k])


def check_step(count: int, p: int, d: int, context: Context) -> None:
    """At most two blocks against FP64; a learning rate of 1 makes the step as large as the weights."""
    blocks = Blocks(min(count, 2), p, d, context.device)
    blocks.lr = torch.ones((), dtype=torch.float64)
    expected = blocks.in_double()
    expected.step("eager")
    with poisoned_memory():
        blocks.step(context.backend)
    for name, x, y in (("W", blocks.weights, expected.weights), ("buffer", blocks.buffers, expected.buffers)):
        check(f"{name} of {p} × {d}", x, y, torch.bfloat16)  # FP32 numbers that are made of BF16 products
    if bool(blocks.skipped.any()):
        raise AssertionError("a block was skipped that is finite")


def check_symmetric(tensors: list[Tensor]) -> None:
    if not all(torch.equal(x, x.mT) for x in tensors):
        raise AssertionError("a symmetric result is not symmetric")


# ---- symmetric products ------------------------------------------------------------------------------------------


def symmetric_rows(count: int, n: int, context: Context) -> list[Row]:
    return [_products_row(count, n, context), _momentum_row(count, n, context)]


def _factors(count: int, n: int, context: Context) -> list[tuple[Tensor, Tensor]]:
    """(C, K) in BF16, as many pairs as the cache asks for."""
    sets = num_inputs(8.0 * count * n * n, context.device)
    pairs = [[_near_identity(count, n, context.device, 2 * index + side) for side in (0, 1)] for index in range(sets)]
    return [(c, k) for c, k in pairs]


def _products_row(count: int, n: int, context: Context) -> Row:
    """P_C = CCᵀ and P_K = KKᵀ."""
    make = implementation(context.backend, "kron_products")
    pairs = _factors(count, n, context)
    c, k = (x[:2] for x in pairs[0])
    with poisoned_memory():
        products = make(c, k, torch.bfloat16)
    check("products", list(products), [torch.bmm(x.double(), x.double().mT) for x in (c, k)])
    check_symmetric(list(products))

    def with_bmm(c: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return torch.bmm(c, c.mT), torch.bmm(k, k.mT)

    variants = {
        "ours": [partial(make, c, k, torch.bfloat16) for c, k in pairs],
        "bmm": [partial(with_bmm, c, k) for c, k in pairs],
    }
    measured = context.timer.measure(variants)
    work = Work(2.0 * count * n**3, 8.0 * count * n * n)
    return _symmetric_row("P", count, n, work, measured["ours"].total, measured["bmm"].total, context)


def _momentum_row(count: int, n: int, context: Context) -> Row:
    """m: one launch of an update against the eager backend's products and element-wise operations."""
    check_update(count, n, n, context)
    sets = num_inputs(40.0 * count * n * n, context.device)
    every = [Blocks(count, n, n, context.device, seed=10 * index) for index in range(sets)]

    def with_bmm(x: Blocks, a: Tensor) -> Tensor:
        numbers = (BATCH_SIZE, DAMPING, GAMMA)
        deltas = [curvature_step(a, x.c, x.k, *numbers), curvature_step(a.mT, x.k, x.c, *numbers)]
        return eager.clipped_momentum([x.m_c, x.m_k], deltas, None, ALPHA2, "frobenius")

    inputs = [torch.stack(x.grads).bfloat16() for x in every]
    variants = {
        "ours": [partial(x.update, context.backend) for x in every],
        "bmm": [partial(with_bmm, x, a) for x, a in zip(every, inputs, strict=True)],
    }
    measured = context.timer.measure(variants, stages=True)
    ours = measured["ours"].stages["kron_momentum_kernel"]
    work = update_stages(n, n)["momentum"] * count
    return _symmetric_row("m", count, n, work, ours, measured["bmm"].total, context)


def _symmetric_row(name: str, count: int, n: int, work: Work, ours: Timing, theirs: Timing, context: Context) -> Row:
    rate = work.flops / ours.median * 1e6
    cells = {
        "µs": ours,
        "bmm µs": theirs,
        "bmm / ours": ratio(theirs, ours),
        "TFLOP/s": rate / 1e12,
        "of rate": rate / context.ceilings.rate if context.ceilings else None,
        "of limit": context.fraction(work, ours),
    }
    targets = {"bmm / ours": Target("≥", SYMMETRIC_TARGETS[n])} if n in SYMMETRIC_TARGETS else {}
    return Row(SYMMETRIC, f"{name}, L = {count}, n = {n}", cells, targets)


def symmetric_cases(context: Context) -> list[Case]:
    return [
        Case(SYMMETRIC, f"L = {count}, n = {n}", partial(symmetric_rows, count, n, context))
        for count, n in context.sizes.squares
    ]


# ---- updates and steps -------------------------------------------------------------------------------------------


def update_rows(count: int, p: int, d: int, context: Context) -> list[Row]:
    """An update: whole, against the eager backend, and launch by launch."""
    check_update(count, p, d, context)
    stages, least = update_stages(p, d), least_update(p, d) * count
    target = Target("≥", 0.7 if p >= 4096 else 0.6)
    return _block_rows(UPDATE, "update", (count, p, d), (stages, least), UPDATE_STAGES, target, context)


def step_rows(count: int, p: int, d: int, context: Context) -> list[Row]:
    """A step, likewise."""
    check_step(count, p, d, context)
    work = step_stages(p, d), least_step(p, d) * count
    return _block_rows(STEP, "step", (count, p, d), work, STEP_STAGES, None, context)


def _block_rows(
    table: str,
    method: str,
    shape: tuple[int, int, int],
    work: tuple[Mapping[str, Work], Work],
    labels: Mapping[str, str],
    target: Target | None,
    context: Context,
) -> list[Row]:
    """Rows of `Blocks.update` or `Blocks.step` on L blocks; `work` is that of a block's launches, and the least."""
    name, (stages, least) = f"{shape[0]} × {shape[1]}×{shape[2]}", work
    first = Blocks(*shape, context.device)
    sets = num_inputs(first.bytes(), context.device)
    every = [first, *(Blocks(*shape, context.device, seed=10 * index) for index in range(1, sets))]
    backends = (context.backend, "eager")
    calls = {backend: [partial(getattr(x, method), backend) for x in every] for backend in backends}
    measured = context.timer.measure(calls)
    ours, eagerly = (measured[backend].total for backend in backends)
    done = total(stages) * shape[0]
    cells: dict[str, Any] = {
        "µs": ours,
        "of roofline": context.fraction(done, ours),
        "of least bytes": context.fraction(least, ours),
        "TFLOP/s": done.flops / ours.median / 1e6,
        "eager µs": eagerly,
        "eager / ours": ratio(eagerly, ours),
    }
    parts = context.timer.measure({context.backend: calls[context.backend]}, stages=True)[context.backend]
    rows = [Row(table, name, cells, {"of roofline": target} if target else {})]
    return [*rows, *_launch_rows(f"{name} {method}", shape[0], stages, labels, parts, context)]


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
    for table, rows in ((UPDATE, update_rows), (STEP, step_rows)):
        for count, p, d in context.sizes.blocks:
            cases.append(Case(table, f"{count} × {p}×{d}", partial(rows, count, p, d, context)))
    return cases
