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
from bench.kernels.optimizers import PEERS
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
    "copy: the bytes of all passes over the time, as a fraction of the copy bandwidth.",
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

    table = DIAGONAL
    bytes_of = staticmethod(diagonal_bytes)

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
    """The tensors of a diagonal step of the recipe, and the operator on them."""

    table = SCALED
    bytes_of = staticmethod(scaled_bytes)

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


def _step_of(
    make: Callable[..., torch.optim.Optimizer], shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype
) -> Call:
    params = random_tensors(shapes, device, dtype, 0.02, seed=0)
    for param, grad in zip(params, random_tensors(shapes, device, dtype, 0.1, seed=1), strict=True):
        param.grad = grad
    optimizer = make(params, lr=1e-4)
    optimizer.step()  # so that what cannot run is found out here
    return optimizer.step


def peers(shapes: Sequence[Shape], device: torch.device) -> dict[str, Callable[[], Call]]:
    """Return makers of PyTorch's own steps on a list of the same shapes, by name."""
    adamw, rmsprop = PEERS["AdamW, fused"], PEERS["RMSprop, foreach"]
    return {
        "AdamW": partial(_step_of, adamw, shapes, device, torch.float32),
        "AdamW BF16": partial(_step_of, adamw, shapes, device, torch.bfloat16),
        "RMSprop": partial(_step_of, rmsprop, shapes, device, torch.float32),
    }


def diagonal_targets(precision: Precision, of_copy: float | None) -> dict[str, Target]:
    """Return the targets of RF-RMSProp by column.

    `of_copy` is the target of FP32 for the fraction of the copy bandwidth. It is None for small lists, whose times do
    not depend on bytes.
    """
    targets = {"of copy": Target("≥", of_copy)} if precision is FP32 and of_copy else {}
    targets["AdamW / ours"] = Target("≥", round(OF_BYTES * FP32.bytes / precision.bytes, 2) if of_copy else 1.0)
    if precision is BF16:  # AdamW in BF16 moves as many bytes
        targets["AdamW in BF16 / ours"] = Target("≥", 1.0)
    return targets


class ListCase(NamedTuple):
    """A list of tensors, and which step is taken on it."""

    kind: type[DiagonalLists]
    name: str
    shapes: Sequence[Shape]
    of_copy: float | None
    context: Context

    @property
    def numbers(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def other(self) -> Backend | None:
        """Return the backend that ours is compared with."""
        return self.context.eager if self.kind is ScaledLists else self.context.other_backend

    def variant(self, precision: Precision, backend: Backend | None) -> str:
        return precision.name if backend in (None, self.context.backend) else f"{precision.name}, {backend.name}"

    def rows(self) -> list[Row]:
        """Time every precision and backend whose result is right, and PyTorch's optimizers, in turn."""
        rows: list[Row] = []
        variants: dict[str, Sequence[Call]] = {}
        for precision in PRECISIONS:
            make = partial(self.kind, self.shapes, precision, self.context.device)
            every = [make() for _ in range(num_inputs(self.numbers * precision.bytes, self.context.device))]
            for backend in filter(None, (self.context.backend, self.other)):
                name = self.variant(precision, backend)
                checked = partial(check_lists, make, self.context, backend)
                if attempt(rows, self.kind.table, f"{self.name}, {name}", checked) is not None:
                    variants[name] = [partial(x.step, backend) for x in every]
        makers = peers(self.shapes, self.context.device)
        for peer, make_step in makers.items():
            if step := attempt(rows, self.kind.table, f"{self.name}, {peer}", make_step):
                variants[peer] = [step]
        measured = self.context.timer.measure(variants)
        rows += [self._row(precision, measured) for precision in PRECISIONS if precision.name in measured]
        theirs = {f"{self.name}, {x} of PyTorch": {"µs": measured[x].total} for x in makers if x in measured}
        return rows + [Row(self.kind.table, name, cells) for name, cells in theirs.items()]

    def _row(self, precision: Precision, measured: dict[str, Measured]) -> Row:
        bytes_of_one = self.kind.bytes_of(precision.param, precision.param, precision.state)
        moved, ours = self.numbers * bytes_of_one, measured[precision.name].total
        cells: dict[str, Any] = {
            "µs": ours,
            "bytes a number": bytes_of_one,
            "GB": moved / 1e9,
            "of copy": self.context.fraction(Work(0, moved), ours),
        }
        columns = {"AdamW": "AdamW / ours", "AdamW BF16": "AdamW in BF16 / ours", "RMSprop": "RMSprop / ours"}
        cells |= {column: ratio(measured[x].total, ours) for x, column in columns.items() if x in measured}
        row = Row(self.kind.table, f"{self.name}, {precision.name}", cells)
        if (other := self.other) and (theirs := measured.get(self.variant(precision, other))):
            cells |= {f"{other.name} µs": theirs.total, f"{other.name} / ours": ratio(theirs.total, ours)}
            if self.kind is DiagonalLists:
                sizes = {"numbers": self.numbers, "tensors": len(self.shapes)}
                times = {self.context.backend.name: ours, other.name: theirs.total}
                row.alternatives = Alternatives("diagonal", sizes, times)
        if self.kind is DiagonalLists:
            row.targets = diagonal_targets(precision, self.of_copy)
        cells["AdamW's bytes / ours"] = FP32.bytes / bytes_of_one
        return row


def diagonal_cases(kind: type[DiagonalLists], context: Context) -> list[Case]:
    """Return the cases of a step on large lists and on small ones, the target for its share of the bandwidth beside."""
    sizes = context.sizes
    model = [*sizes.model.shapes().values()]
    lists = {
        "1 GB": ([(sizes.numbers // NUM_LARGE,)] * NUM_LARGE, 0.92),
        "GPT-2 124M": (model, 0.85),
        f"{sizes.small} tensors of {sizes.small}": ([(sizes.small,)] * sizes.small, None),
        "GPT-2 124M's vectors": ([shape for shape in model if len(shape) == 1], None),
    }
    return [
        Case(kind.table, name, ListCase(kind, name, shapes, of_copy, context).rows)
        for name, (shapes, of_copy) in lists.items()
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
