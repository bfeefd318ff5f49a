"""Symmetric products, which save half of their multiplications, against `torch.bmm` and the limits of the device."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from bench.common.report import Alternatives, Row, Target
from bench.common.roofline import Work, update_stages
from bench.common.timing import Timing, num_inputs
from bench.kernels.blocks import OPTIONS, Blocks, near_identity
from bench.kernels.cases import Case, Context, check, poisoned_memory, ratio, require
from bench.kernels.kron import check_symmetric, check_update
from rootfree_kernels.eager.products import curvature_step

SYMMETRIC = "Symmetric products"

NOTES = {
    SYMMETRIC: "L products of either side: P = XXᵀ against `torch.bmm`; the same as an update makes them, which copies "
    "X on the way (what a dispatch table goes by); and the kernel of m against four products of `torch.bmm` with the "
    "element-wise operations behind them (the eager backend's). TFLOP/s count n³ a symmetric product, of rate: that "
    "over the 8192³ product's rate; a half is what `torch.bmm` could have at most."
}

TARGETS = {768: 1.15, 1024: 1.15, 2048: 1.3, 4096: 1.5}
"""The time of `torch.bmm` over ours by n. With t = n/128 tiles a side, t² / (t(t + 1)/2) is the most that the saved
multiplications allow: 1.71, 1.78, 1.88 and 1.94."""


def symmetric_rows(count: int, n: int, context: Context) -> list[Row]:
    return [_products_row(count, n, context), _kept_row(count, n, context), _momentum_row(count, n, context)]


def _factors(count: int, n: int, bytes_of_one: float, context: Context) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of C and K in BF16, as many as the cache asks for."""
    sets = num_inputs(bytes_of_one, context.device)
    pairs = [[near_identity(count, n, context.device, 2 * index + side) for side in (0, 1)] for index in range(sets)]
    return [(c, k) for c, k in pairs]


def _products_row(count: int, n: int, context: Context) -> Row:
    """Time P_C = CCᵀ and P_K = KKᵀ."""
    make = context.backend.operators.kron_products
    pairs = _factors(count, n, 8.0 * count * n * n, context)
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


def _kept_row(count: int, n: int, context: Context) -> Row:
    """Time the last launch of an update: P_C and P_K of new factors, which it also copies to the old ones' place."""
    module = import_module("rootfree_kernels.triton_kernels.products")
    makers = {context.backend.name: module.make_products, "bmm": module.products_by_bmm}
    every = []
    for factors in _factors(count, n, 12.0 * count * n * n, context):
        products, kept = ([torch.empty_like(x) for x in factors] for _ in range(2))
        every.append((*factors, *products, tuple(kept)))
    c, k, *products, kept = every[0]
    for name, make in makers.items():
        for x in (*products, *kept):
            x.fill_(torch.nan)
        make(*every[0])
        expected = [torch.bmm(x[:2].double(), x[:2].double().mT) for x in (c, k)]
        check(f"products by {name}", [x[:2] for x in products], expected)
        require(all(map(torch.equal, kept, (c, k))), f"factors were not kept by {name}")
    measured = context.timer.measure({name: [partial(make, *x) for x in every] for name, make in makers.items()})
    times = {name: measured[name].total for name in makers}
    row = _symmetric_row("P, X copied", count, n, update_stages(n, n)["products"] * count, *times.values(), context)
    row.alternatives = Alternatives("symmetric", {"side": n, "blocks": count}, times)
    return row


def _momentum_row(count: int, n: int, context: Context) -> Row:
    """Time the launch of m in an update against the eager backend's products and element-wise operations."""
    shape = count, n, n
    check_update(shape, context)
    sets = num_inputs(40.0 * count * n * n, context.device)
    every = [Blocks(shape, context.device, seed=10 * index) for index in range(sets)]

    def with_bmm(x: Blocks, a: Tensor) -> Tensor:
        deltas = [curvature_step(a, x.c, x.k, OPTIONS), curvature_step(a.mT, x.k, x.c, OPTIONS)]
        momenta, alpha2 = [x.m_c, x.m_k], OPTIONS.riemannian_momentum
        return context.eager.operators.clipped_momentum(momenta, deltas, None, alpha2, OPTIONS.clip)

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
        "of rate": rate / context.roofline.bf16 if context.roofline else None,
        "of limit": context.fraction(work, ours),
    }
    targets = {"bmm / ours": Target("≥", TARGETS[n])} if n in TARGETS and name != "P, X copied" else {}
    return Row(SYMMETRIC, f"{name}, L = {count}, n = {n}", cells, targets)


def symmetric_cases(context: Context) -> list[Case]:
    return [
        Case(SYMMETRIC, f"L = {count}, n = {n}", partial(symmetric_rows, count, n, context))
        for count, n in context.sizes.squares
    ]
