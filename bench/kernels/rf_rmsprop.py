"""The diagonal steps and the clipped momentum against the copy bandwidth, and AdamW and RMSProp of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common.report import Alternatives, Row, Target
from bench.common.roofline import Work, diagonal_bytes, momentum_bytes, scaled_bytes
from bench.common.tensors import Shape, random_tensors
from bench.common.timing import Call, Measured, num_inputs
from bench.kernels.cases import Case, Context, attempt, check, in_double, ratio, require
from rootfree_kernels import ops
from rootfree_kernels.arguments import DiagonalOptions, DiagonalState, Draws, ScaledOptions, ScaledState, Scaling
from rootfree_kernels.backend import Backend

DIAGONAL, SCALED, MOMENTUM = "RF-RMSProp", "Diagonal step of the recipe", "Clipped momentum"
NUM_LARGE = 16
"""Tensors of the large list."""

OF_BYTES = 1.0
"""The target for fused AdamW's time over ours, as a fraction of its bytes over ours."""

NOTES = {
    DIAGONAL: "Bytes: each tensor read once, each but the gradient written once. Of copy: those bytes over the time, "
    "as a fraction of the copy bandwidth. Ours is Triton's step; ratios are times of the other (cuda: this library's "
    "kernels in CUDA) over ours on the same list. Fused AdamW in FP32 moves 28 bytes a number. On lists that memory "
    f"bounds, the target for the ratio to it is {OF_BYTES:g} of its bytes over ours: as many bytes a second as AdamW, "
    "and no slower at equal bytes. On lists of small tensors, where launches take the time, it is 1.",
    SCALED: "The whitened step of embeddings, heads and vectors, with gradient momentum, damping relative to the mean "
    "curvature, and updates of a fixed norm. The norms must be known before anything is scaled, hence three passes. Of "
    "copy: the bytes of all passes over the time; of least bytes: each tensor read once, each but the gradient "
    "written once.",
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
SCALED_OPTIONS = ScaledOptions(
    *OPTIONS._replace(beta2=0.02, damping=1e-8, decoupled=True),
    direction="whitened",
    relative_damping=True,
    momentum_on="gradient",
    nesterov=True,
)
RMS = 0.2
"""The root mean square of the recipe's updates: times a learning rate of 0.1 it is that of the weights."""


class DiagonalLists:
    """The tensors of a diagonal step, and the operator on them."""

    def __init__(self, shapes: Sequence[Shape], precision: Precision, device: torch.device) -> None:
        self.params = random_tensors(shapes, device, precision.param, 0.02, seed=0)
        self.grads = random_tensors(shapes, device, precision.param, 0.1, seed=1)
        self.squares = [x.abs() for x in random_tensors(shapes, device, precision.state, 1.0, seed=2)]
        self.buffers = random_tensors(shapes, device, precision.state, 0.1, seed=3)
        self.skipped = [torch.zeros((), dtype=torch.int32, device=device) for _ in shapes]
        seeds = torch.arange(len(shapes), dtype=torch.int32, device=device)
        self.draws = Draws(seeds, torch.zeros(len(shapes), device=device))

    def changed(self) -> dict[str, list[Tensor]]:
        return {"weights": self.params, "s": self.squares, "m": self.buffers}

    def step(self, backend: Backend, lr: float = 1e-4) -> None:
        state, rate = DiagonalState(self.squares, self.buffers, self.skipped, [], []), _learning_rate(lr)
        ops.rf_rmsprop(self.params, state, self.grads, rate, self.draws, Scaling(None, None), OPTIONS, backend)


class ScaledLists(DiagonalLists):
    """The tensors of a diagonal step of the recipe."""

    def __init__(self, shapes: Sequence[Shape], precision: Precision, device: torch.device) -> None:
        super().__init__(shapes, precision, device)
        self.curvatures = [torch.ones((), device=device) for _ in shapes]
        self.norms = torch.tensor([RMS * prod(shape) ** 0.5 for shape in shapes], device=device)

    def changed(self) -> dict[str, list[Tensor]]:
        return {**super().changed(), "q": self.curvatures}

    def step(self, backend: Backend, lr: float = 1e-4) -> None:
        state = ScaledState(self.squares, self.buffers, self.skipped, self.curvatures, [], [], self.norms)
        rate, scaling = _learning_rate(lr), Scaling(None, None)
        ops.scaled_rmsprop(self.params, state, self.grads, rate, self.draws, scaling, SCALED_OPTIONS, backend)


def _learning_rate(lr: float) -> Tensor:
    return torch.tensor(lr, dtype=torch.float64)


def check_lists(make: Callable[[], DiagonalLists], context: Context, backend: Backend) -> float:
    """Return the largest relative error of a step against FP64; the step is as large as the weights are."""
    lists = make()
    expected = in_double(lists)
    expected.step(context.eager, 0.1)
    lists.step(backend, 0.1)
    correct = expected.changed()
    errors = [check(name, x, correct[name]) for name, x in lists.changed().items()]
    require(not any(map(int, lists.skipped)), "numbers were skipped that are finite")
    return max(errors)


def peers(shapes: Sequence[Shape], device: torch.device) -> dict[str, Callable[[], Call]]:
    """Return makers of PyTorch's own steps on a list of the same shapes, by name."""

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
    """Return the targets of a row by column.

    `of_copy` is the target of FP32 for the fraction of the copy bandwidth. It is None for small lists, whose times do
    not depend on bytes.
    """
    targets = {"of copy": Target("≥", of_copy)} if precision is FP32 and of_copy else {}
    targets["AdamW / ours"] = Target("≥", round(OF_BYTES * FP32.bytes / precision.bytes, 2) if of_copy else 1.0)
    if precision is BF16:  # AdamW in BF16 moves as many bytes
        targets["AdamW in BF16 / ours"] = Target("≥", 1.0)
    return targets


class ListCase(NamedTuple):
    """A list of tensors to step, and the calls that are timed on it."""

    table: str
    name: str
    shapes: Sequence[Shape]
    context: Context

    def steps(self, kind: type[DiagonalLists], backends: Sequence[Backend], rows: list[Row]) -> dict[str, list[Call]]:
        """Return the steps of every precision and backend whose result is right; the others get a row."""
        found = {}
        for precision in PRECISIONS:
            make = partial(kind, self.shapes, precision, self.context.device)
            every = [make() for _ in range(num_inputs(self.numbers * precision.bytes, self.context.device))]
            for backend in backends:
                name = variant(precision, backend, self.context)
                checked = partial(check_lists, make, self.context, backend)
                if attempt(rows, self.table, f"{self.name}, {name}", checked) is not None:
                    found[name] = [partial(x.step, backend) for x in every]
        return found

    @property
    def numbers(self) -> int:
        return sum(map(prod, self.shapes))


def variant(precision: Precision, backend: Backend | None, context: Context) -> str:
    return precision.name if backend in (None, context.backend) else f"{precision.name}, {backend.name}"


def diagonal_rows(case: ListCase, of_copy: float | None) -> list[Row]:
    """Time every precision on one list of tensors and PyTorch's optimizers, which take turns."""
    rows: list[Row] = []
    context = case.context
    variants = case.steps(DiagonalLists, [*filter(None, (context.backend, context.other_backend))], rows)
    makers = peers(case.shapes, context.device)
    for peer, make in makers.items():
        if step := attempt(rows, DIAGONAL, f"{case.name}, {peer}", make):
            variants[peer] = [step]
    measured = context.timer.measure(variants)
    rows += [_diagonal_row(case, x, of_copy, measured) for x in PRECISIONS if x.name in measured]
    theirs = [Row(DIAGONAL, f"{case.name}, {x} of PyTorch", {"µs": measured[x].total}) for x in makers if x in measured]
    return rows + theirs


def _diagonal_row(case: ListCase, precision: Precision, of_copy: float | None, measured: dict[str, Measured]) -> Row:
    context, moved, ours = case.context, case.numbers * precision.bytes, measured[precision.name].total
    cells: dict[str, Any] = {
        "µs": ours,
        "bytes a number": precision.bytes,
        "GB": moved / 1e9,
        "of copy": context.fraction(Work(0, moved), ours),
    }
    columns = {"AdamW": "AdamW / ours", "AdamW BF16": "AdamW in BF16 / ours", "RMSprop": "RMSprop / ours"}
    cells |= {column: ratio(measured[x].total, ours) for x, column in columns.items() if x in measured}
    backend, alternatives = context.other_backend, None
    if (compiled := measured.get(variant(precision, backend, context))) and backend:
        cells |= {f"{backend.name} µs": compiled.total, f"{backend.name} / ours": ratio(compiled.total, ours)}
        sizes = {"numbers": case.numbers, "tensors": len(case.shapes)}
        alternatives = Alternatives("diagonal", sizes, {context.backend.name: ours, backend.name: compiled.total})
    cells["AdamW's bytes / ours"] = FP32.bytes / precision.bytes
    targets = diagonal_targets(precision, of_copy)
    return Row(DIAGONAL, f"{case.name}, {precision.name}", cells, targets, alternatives=alternatives)


def scaled_rows(case: ListCase) -> list[Row]:
    """Time every precision of the recipe's diagonal step, and the eager backend and fused AdamW, which take turns."""
    rows: list[Row] = []
    context = case.context
    variants = case.steps(ScaledLists, [context.backend, context.eager], rows)
    if step := attempt(rows, SCALED, f"{case.name}, AdamW", peers(case.shapes, context.device)["AdamW"]):
        variants["AdamW"] = [step]
    measured = context.timer.measure(variants)
    for precision in PRECISIONS:
        if precision.name in measured:
            ours, bytes_ = (
                measured[precision.name].total,
                scaled_bytes(precision.param, precision.param, precision.state),
            )
            cells = {
                "µs": ours,
                "bytes a number": bytes_,
                "of copy": context.fraction(Work(0, case.numbers * bytes_), ours),
                "of least bytes": context.fraction(Work(0, case.numbers * precision.bytes), ours),
            }
            others = {"eager": variant(precision, context.eager, context), "AdamW": "AdamW"}
            cells |= {f"{x} / ours": ratio(measured[y].total, ours) for x, y in others.items() if y in measured}
            rows.append(Row(SCALED, f"{case.name}, {precision.name}", cells))
    return rows


def _lists(context: Context) -> dict[str, tuple[list[Shape], float | None]]:
    """Return lists of tensors and the target for the fraction of the copy bandwidth, by name."""
    sizes = context.sizes
    model = [*sizes.model.shapes().values()]
    return {
        "1 GB": ([(sizes.numbers // NUM_LARGE,)] * NUM_LARGE, 0.92),
        "GPT-2 124M": (model, 0.85),
        f"{sizes.small} tensors of {sizes.small}": ([(sizes.small,)] * sizes.small, None),
        "GPT-2 124M's vectors": ([shape for shape in model if len(shape) == 1], None),
    }


def diagonal_cases(context: Context) -> list[Case]:
    return [
        Case(DIAGONAL, name, partial(diagonal_rows, ListCase(DIAGONAL, name, shapes, context), of_copy))
        for name, (shapes, of_copy) in _lists(context).items()
    ]


def scaled_cases(context: Context) -> list[Case]:
    return [
        Case(SCALED, name, partial(scaled_rows, ListCase(SCALED, name, shapes, context)))
        for name, (shapes, _) in _lists(context).items()
    ]


# ---- the clipped momentum ------------------------------------------------------------------------------------------


class MomentumSides:
    """m and Δ of the sides of batches. Each batch has two sides, (L, n) of C and of K."""

    def __init__(self, batches: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> None:
        def sides(dtype: torch.dtype, seed: int) -> list[list[Tensor]]:
            shapes = [[(count, n, n) for count, n in batch] for batch in batches]
            return [[x + x.mT for x in random_tensors(each, device, dtype, 0.1, seed)] for each in shapes]

        self.momenta = sides(torch.bfloat16, 0)
        self.deltas = sides(torch.float32, 1)

    def numbers(self) -> int:
        return sum(x.numel() for batch in self.momenta for x in batch)

    def step(self, backend: Backend) -> list[Tensor]:
        """Step all momenta and return the clips of every batch."""
        pairs = zip(self.momenta, self.deltas, strict=True)
        return [ops.clipped_momentum(m, delta, None, 0.5, "frobenius", backend) for m, delta in pairs]


def check_momentum(sides: MomentumSides, backend: Backend, eager: Backend) -> float:
    """Return the largest relative error of m and of the clips against FP64."""
    expected = in_double(sides)
    clips = expected.step(eager)
    errors = [check("clips", sides.step(backend), clips)]
    return max(errors + [check("m", x, y) for x, y in zip(sides.momenta, expected.momenta, strict=True)])


def momentum_rows(name: str, batches: Sequence[Sequence[tuple[int, int]]], context: Context) -> list[Row]:
    backends = [*filter(None, (context.backend, context.other_backend)), context.eager]
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
    if other := context.other_backend:
        cells[f"{other.name} / ours"] = ratio(measured[other.name].total, ours)
    return [Row(MOMENTUM, name, cells)]


def momentum_cases(context: Context) -> list[Case]:
    side = max(1, min(1024, int((context.sizes.numbers / 2) ** 0.5)))
    count = max(1, context.sizes.numbers // (2 * side * side))
    model = [((count, p), (count, d)) for (p, d), count in context.sizes.model.blocks().items()]
    lists = {f"{count} blocks of {side} × {side}": [((count, side), (count, side))], "GPT-2 124M's blocks": model}
    return [Case(MOMENTUM, name, partial(momentum_rows, name, batches, context)) for name, batches in lists.items()]
