"""Shared by the tables of `bench.kernels`: sizes, the device and its roofline, checks of results against FP64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from bench.common.gpt import GPT2
from bench.common.report import Row
from bench.common.roofline import Roofline, Work
from bench.common.timing import Timer, Timing
from rootfree_kernels.backend import Backend
from rootfree_kernels.ops.backends import choose, fused_backends


@dataclass(frozen=True)
class Sizes:
    """The sizes of everything that is measured. The defaults are those of a full run."""

    numbers: int = 1 << 28
    """FP32 numbers of the large list of tensors: 1.07 GB."""

    copied: int = 1 << 29
    """FP32 numbers of the copy that gives the bandwidth: 2.1 GB are read and as many written."""

    product: int = 8192
    """Side of the BF16 product that gives the rate."""

    small: int = 1000
    """Tensors of the list of small ones, and numbers of each."""

    squares: tuple[tuple[int, int], ...] = ((48, 768), (24, 1024), (6, 2048), (2, 4096), (96, 256), (8, 512))
    """(L, n) of symmetric products: a batch has L of each side."""

    blocks: tuple[tuple[int, int, int], ...] = (
        *((48, 768, 768), (36, 768, 1024), (49, 1008, 768), (2, 4096, 4096)),
        *((96, 256, 256), (8, 512, 512)),
    )
    """(L, p, d) of updates and steps by the paper's rule."""

    other_blocks: tuple[tuple[int, int, int], ...] = ((48, 768, 768), (2, 4096, 4096))
    """(L, p, d) of updates with clip="row_sum", and of updates and steps of the recipe."""

    model: GPT2 = field(default_factory=GPT2)


QUICK = Sizes(blocks=((48, 768, 768), (2, 4096, 4096)), other_blocks=((2, 4096, 4096),), squares=((48, 768), (2, 4096)))
TINY = Sizes(3000, 100, 32, 10, ((1, 16),), ((1, 16, 24),), ((1, 16, 24),), GPT2(1, 8, 50, 4))


@dataclass
class Context:
    """The device, the timer, and what was measured first."""

    device: torch.device
    sizes: Sizes
    timer: Timer
    roofline: Roofline | None = None
    chosen: Backend | None = None

    @cached_property
    def backend(self) -> Backend:
        """Return the backend that is measured: the chosen one, or else the best that has all operators."""
        return self.chosen or fused_backends(self.device, torch.float32, (torch.bfloat16, None))[0]

    @cached_property
    def eager(self) -> Backend:
        """Return the backend that ours is compared with."""
        return choose(self.device, torch.float32, fused=False)

    @cached_property
    def other_backend(self) -> Backend | None:
        """Return the best other backend with kernels for lists of tensors, None if there is none."""
        others = (backend for backend in fused_backends(self.device, torch.float32) if backend is not self.backend)
        return next(others, None)

    def fraction(self, work: Work, timing: Timing) -> float | None:
        """Return the least time of the work over the measured one, None if the roofline was not measured."""
        return self.roofline.limit(work) / timing.median if self.roofline else None


class Case(NamedTuple):
    """A measurement by itself. An error of its function is recorded and stops no other case."""

    table: str
    name: str
    run: Callable[[], Sequence[Row]]


def ratio(theirs: Timing, ours: Timing) -> float:
    """Return how many times as long the other one takes."""
    return theirs.median / ours.median


def attempt(rows: list[Row], table: str, name: str, function: Callable[[], Any]) -> Any:
    """Return the result of `function`. If it fails, return None and append a row with the error."""
    try:
        return function()
    except Exception as error:  # of any kind: what fails is recorded, and the rest is measured
        rows.append(Row(table, name, error=f"{type(error).__name__}: {error}"))
        return None


# ---- checks --------------------------------------------------------------------------------------------------------

TOLERANCE = {
    torch.float32: 3e-5,  # a few roundings of 6e-8, amplified by a sum
    torch.bfloat16: 3e-2,  # a handful of roundings of 4e-3, of operands, intermediate results and what is stored
}
"""The largest relative Frobenius error against FP64, by the dtype in which a result is stored."""

COMPUTES = os.environ.get("ROOTFREE_FAKE_GPU") != "1"
"""False on the fake GPU of tests/fake_gpu, which can run these benchmarks but computes nothing."""


class CheckFailed(Exception):
    """A result is wrong, so nothing is timed."""


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return ‖actual − expected‖ / ‖expected‖ over all numbers of two lists, in FP64; NaN if any is."""
    difference = sum(float((x.double() - y).norm()) ** 2 for x, y in zip(actual, expected, strict=True))
    return math.sqrt(difference) / max(math.sqrt(sum(float(y.norm()) ** 2 for y in expected)), 1e-300)


def check(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype | None = None) -> float:
    """Return the relative error of a list of tensors.

    Raises:
        CheckFailed: the error is larger than the tolerance of the dtype, or NaN.
    """
    error, allowed = relative_error(actual, expected), TOLERANCE[dtype or actual[0].dtype]
    require(error <= allowed, f"{name}: relative error {error:.2e} against FP64, {allowed:.0e} allowed")
    return error


def in_double(x: Any) -> Any:
    """Return a copy of an object, in which its floating-point tensors and those in its lists are in FP64."""

    def copied(value: Any) -> Any:
        if isinstance(value, list):
            return [copied(each) for each in value]
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value.clone()
        return value

    made = copy(x)
    vars(made).update({name: copied(value) for name, value in vars(x).items()})
    return made


def require(condition: bool, message: str) -> None:
    """Raise CheckFailed unless a condition holds."""
    if COMPUTES and not condition:
        raise CheckFailed(message)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new empty tensors with NaN, or with the least whole number, so that elements left unwritten show."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            x = make(*args, **options)
            if x.dtype == torch.bool:
                return x
            return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)

        return call

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"), (torch, "empty_strided")):
            stack.enter_context(patch.object(owner, name, poisoned(getattr(owner, name))))
        yield
