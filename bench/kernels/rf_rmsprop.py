"""RF-RMSProp and the clipped momentum against the copy bandwidth, and against AdamW and RMSProp of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common.gpt2 import Shape, Work, diagonal_bytes, momentum_bytes, random_tensors
from bench.common.report import Alternatives, Row, Target
from bench.common.timing import Call, Measured, num_inputs
from bench.kernels.cases import Case, Context, attempt, check, ratio, require
from rootfree_kernels import ops
from rootfree_kernels.arguments import DiagonalOptions, DiagonalState, Draws, Scaling
from rootfree_kernels.backend import Backend

DIAGONAL, MOMENTUM = "RF-RMSProp", "Clipped momentum"
NUM_LARGE = 16
"""Tensors of the large list."""

OF_BYTES = 1.0
"""What fused AdamW's time over ours is to reach, as a fraction of its bytes over ours: as many bytes a second as it."""

NOTES = {
    DIAGONAL: "Bytes: each tensor read once, each but the gradient written once. Of copy: those bytes over the time, "
    "as a fraction of the copy bandwidth. Ours is Triton's step; ratios are times of the other (cuda: this library's "
    "kernels in CUDA) over ours on the same list. Fused AdamW in FP32 moves 28 bytes a number. On lists that memory "
    f"bounds, the target for the ratio to it is {OF_BYTES:g} of its bytes over ours: as many bytes a second as AdamW, "
    "and no slower at equal bytes. On lists of small tensors, where launches take the time, it is 1.",
    MOMENTUM: "BF16 m, FP32 Δ. Of copy: m and Δ read once and m written once, 8 bytes a number, over the time. The "
    "norm must be known before m may change, hence two passes, which read 6 bytes more.",
}


class Precision(NamedTuple):
    """Dtypes of parameters and gradients, and of the state."""

    name: str
    param: torch.dtype
    state: torch.dtype

    @property
    def bytes(self) -> int:
        return diagonal_bytes(self.param, self.param, self.state)


FP32 = Precision("FP32", torch.float32, torch.float32)
MIXED = Precision("BF16 weights and gradients, FP32 state", torch.bfloat16, torch.float32)
BF16 = Precision("BF16, state too", torch.bfloat16, torch.bfloat16)
PRECISIONS = (FP32, MIXED, BF16)


OPTIONS = DiagonalOptions(
    batch_size=16.0,
    beta2=0.1,
    gamma=1.0,
    momentum=0.9,
    damping=1e-2,
    weight_decay=0.01,
    decoupled=False,
    maximize=False,
    rounding="stochastic",
    weight_rounding="stochastic",
)


class DiagonalLists:
    """The tensors of a diagonal step, and the operator on them."""

    def __init__(self, shapes: Sequence[Shape], precision: Precision, device: torch.device) -> None:
        self.device = device
        self.params = random_tensors(shapes, device, precision.param, 0.02, seed=0)
        self.grads = random_tensors(shapes, device, precision.param, 0.1, seed=1)
        self.squares = [x.abs() for x in random_tensors(shapes, device, precision.state, 1.0, seed=2)]
        self.buffers = random_tensors(shapes, device, precision.state, 0.1, seed=3)
        self.skipped = [torch.zeros((), dtype=torch.int32, device=device) for _ in shapes]
        self.seeds = torch.arange(len(shapes), dtype=torch.int32, device=device)
        self.steps = torch.zeros(len(shapes), device=device)

    def changed(self) -> list[list[Tensor]]:
        return [self.params, self.squares, self.buffers]

    def in_double(self) -> list[list[Tensor]]:
        """Params, squares, buffers and gradients in FP64."""
        return [[x.double() for x in tensors] for tensors in (*self.changed(), self.grads)]

    def step(self, backend: Backend, lr: float = 1e-4, lists: list[list[Tensor]] | None = None) -> None:
        """A step of these tensors, or of `lists`: params, squares, buffers, gradients."""
        params, squares, buffers, grads = lists or [*self.changed(), self.grads]
        rate = torch.tensor(lr, dtype=torch.float64)
        state, draws = DiagonalState(squares, buffers, self.skipped, [], []), Draws(self.seeds, self.steps)
        ops.rf_rmsprop(params, state, grads, rate, draws, Scaling(None, None), OPTIONS, backend)


def check_diagonal(shapes: Sequence[Shape], precision: Precision, context: Context, backend: Backend) -> float:
    """The largest relative error of weights, s and m against FP64; the weights are of a step as large as they are."""
    lists = DiagonalLists(shapes, precision, context.device)
    expected = lists.in_double()
    lists.step(context.eager, 0.1, expected)
    for skipped in lists.skipped:
        skipped.zero_()
    lists.step(backend, 0.1)
    names = ("weights", "s", "m")
    errors = [check(name, x, y) for name, x, y in zip(names, lists.changed(), expected, strict=False)]
    require(not any(int(x) for x in lists.skipped), "numbers were skipped that are finite")
    return max(errors)


def peers(shapes: Sequence[Shape], device: torch.device) -> dict[str, Callable[[], Call]]:
    """PyTorch's own steps on a list of the same shapes, by name, made when called."""

    def step_of(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, **options: Any) -> Call:
        params = random_tensors(shapes, device, dtype, 0.02, seed=0)
        for param, grad in zip(params, random_tensors(shapes, device, dtype, 0.1, seed=1), strict=True):
            param.grad = grad
        optimizer = make(params, lr=1e-4, **options)
        optimizer.step()  # so that what cannot run is found out here
        return optimizer.step

    return {
        "AdamW": partial(step_of, torch.optim.AdamW, torch.float32, fused=True),
        "AdamW BF16": partial(step_of, torch.optim.AdamW, torch.bfloat16, fused=True),
        "RMSprop": partial(step_of, torch.optim.RMSprop, torch.float32, foreach=True, momentum=0.9),
    }


def diagonal_targets(precision: Precision, of_copy: float | None) -> dict[str, Target]:
    """Return the targets of a row by column. `of_copy` is the target of FP32 for the fraction of the copy bandwidth; it
    is None for small lists, whose times bytes do not decide."""
    targets = {"of copy": Target("≥", of_copy)} if precision is FP32 and of_copy else {}
    targets["AdamW / ours"] = Target("≥", round(OF_BYTES * FP32.bytes / precision.bytes, 2) if of_copy else 1.0)
    if precision is BF16:  # whose AdamW moves the bytes that ours moves
        targets["AdamW in BF16 / ours"] = Target("≥", 1.0)
    return targets


def variant(precision: Precision, backend: Backend | None, context: Context) -> str:
    return precision.name if backend in (None, context.backend) else f"{precision.name}, {backend.name}"


def diagonal_rows(name: str, shapes: Sequence[Shape], of_copy: float | None, context: Context) -> list[Row]:
    """Every precision on one list of tensors, and the peers, in turn."""
    rows: list[Row] = []
    numbers = sum(map(prod, shapes))
    variants: dict[str, Sequence[Call]] = {}
    for precision in PRECISIONS:
        sets = num_inputs(numbers * precision.bytes, context.device)
        lists = [DiagonalLists(shapes, precision, context.device) for _ in range(sets)]
        for backend in filter(None, (context.backend, context.other_backend())):
            case = f"{name}, {variant(precision, backend, context)}"
            error = attempt(rows, DIAGONAL, case, partial(check_diagonal, shapes, precision, context, backend))
            if error is not None:
                variants[variant(precision, backend, context)] = [partial(x.step, backend) for x in lists]
    for peer, make in peers(shapes, context.device).items():
        if step := attempt(rows, DIAGONAL, f"{name}, {peer}", make):
            variants[peer] = [step]
    measured = context.timer.measure(variants)
    for precision in PRECISIONS:
        if precision.name in measured:
            sizes = {"numbers": numbers, "tensors": len(shapes)}
            rows.append(_diagonal_row(name, sizes, precision, of_copy, measured, context))
    for peer in peers(shapes, context.device):
        if peer in measured:
            rows.append(Row(DIAGONAL, f"{name}, {peer} of PyTorch", {"µs": measured[peer].total}))
    return rows


def _diagonal_row(
    name: str,
    sizes: dict[str, int],
    precision: Precision,
    of_copy: float | None,
    measured: dict[str, Measured],
    context: Context,
) -> Row:
    moved, ours = sizes["numbers"] * precision.bytes, measured[precision.name].total
    cells: dict[str, Any] = {
        "µs": ours,
        "bytes a number": precision.bytes,
        "GB": moved / 1e9,
        "of copy": context.fraction(Work(0, moved), ours),
    }
    columns = {"AdamW": "AdamW / ours", "AdamW BF16": "AdamW in BF16 / ours", "RMSprop": "RMSprop / ours"}
    for peer, column in columns.items():
        if peer in measured:
            cells[column] = ratio(measured[peer].total, ours)
    backend, alternatives = context.other_backend(), None
    if (compiled := measured.get(variant(precision, backend, context))) and backend:
        cells[f"{backend.name} µs"], cells[f"{backend.name} / ours"] = compiled.total, ratio(compiled.total, ours)
        alternatives = Alternatives("diagonal", sizes, {context.backend.name: ours, backend.name: compiled.total})
    cells["AdamW's bytes / ours"] = FP32.bytes / precision.bytes
    targets = diagonal_targets(precision, of_copy)
    return Row(DIAGONAL, f"{name}, {precision.name}", cells, targets, alternatives=alternatives)


def diagonal_cases(context: Context) -> list[Case]:
    large = [(context.sizes.numbers // NUM_LARGE,)] * NUM_LARGE
    small = [(context.sizes.small,)] * context.sizes.small
    model = [*context.sizes.model.shapes().values()]
    lists = {
        "1 GB": (large, 0.92),
        "GPT-2 124M": (model, 0.85),
        f"{len(small)} tensors of {len(small)}": (small, None),
        "GPT-2 124M's vectors": ([shape for shape in model if len(shape) == 1], None),
    }
    return [
        Case(DIAGONAL, name, partial(diagonal_rows, name, shapes, of_copy, context))
        for name, (shapes, of_copy) in lists.items()
    ]


# ---- the clipped momentum ----------------------------------------------------------------------------------------


class MomentumSides:
    """m and Δ of the sides of batches; each batch has two sides, (L, n) of C and of K."""

    def __init__(self, batches: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> None:
        def sides(dtype: torch.dtype, seed: int) -> list[list[Tensor]]:
            shapes = [[(count, n, n) for count, n in batch] for batch in batches]
            return [[x + x.mT for x in random_tensors(each, device, dtype, 0.1, seed)] for each in shapes]

        self.momenta = sides(torch.bfloat16, 0)
        self.deltas = sides(torch.float32, 1)

    def numbers(self) -> int:
        return sum(x.numel() for batch in self.momenta for x in batch)

    def step(self, backend: Backend) -> list[Tensor]:
        """The clips of every batch."""
        pairs = zip(self.momenta, self.deltas, strict=True)
        return [ops.clipped_momentum(m, delta, None, 0.5, "frobenius", backend) for m, delta in pairs]


def check_momentum(sides: MomentumSides, backend: Backend, eager: Backend) -> float:
    """The largest relative error of m and of the clips against FP64; Δ is overwritten."""
    expected = [[x.double() for x in batch] for batch in sides.momenta]
    clips = [
        ops.clipped_momentum(m, [x.double() for x in delta], None, 0.5, "frobenius", eager)
        for m, delta in zip(expected, sides.deltas, strict=True)
    ]
    found = sides.step(backend)
    errors = [check("clips", found, clips)]
    return max(errors + [check("m", x, y) for x, y in zip(sides.momenta, expected, strict=True)])


def momentum_rows(name: str, batches: Sequence[Sequence[tuple[int, int]]], context: Context) -> list[Row]:
    backends = [*filter(None, (context.backend, context.other_backend())), context.eager]
    for backend in backends[:-1]:
        check_momentum(MomentumSides(batches, context.device), backend, context.eager)
    sides = MomentumSides(batches, context.device)
    moved, twice = (sides.numbers() * momentum_bytes(torch.bfloat16, passes) for passes in (1, 2))
    every = [sides, *(MomentumSides(batches, context.device) for _ in range(num_inputs(moved, context.device) - 1))]
    measured = context.timer.measure({x.name: [partial(y.step, x) for y in every] for x in backends})
    ours, eager = measured[context.backend.name].total, measured[context.eager.name].total
    cells = {
        "µs": ours,
        "GB": moved / 1e9,
        "of copy": context.fraction(Work(0, moved), ours),
        "of copy, two passes": context.fraction(Work(0, twice), ours),
        "eager µs": eager,
        "eager / ours": ratio(eager, ours),
    }
    if other := context.other_backend():
        cells[f"{other.name} / ours"] = ratio(measured[other.name].total, ours)
    return [Row(MOMENTUM, name, cells)]


def momentum_cases(context: Context) -> list[Case]:
    side = max(1, min(1024, int((context.sizes.numbers / 2) ** 0.5)))
    count = max(1, context.sizes.numbers // (2 * side * side))
    model = [((count, p), (count, d)) for (p, d), count in context.sizes.model.blocks().items()]
    lists = {f"{count} blocks of {side} × {side}": [((count, side), (count, side))], "GPT-2 124M's blocks": model}
    return [Case(MOMENTUM, name, partial(momentum_rows, name, batches, context)) for name, batches in lists.items()]
