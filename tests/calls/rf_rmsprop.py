"""Calls of `rf_rmsprop`: tensors on any device and in any layout, expected results, and comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rootfree_kernels import rounding as rnd
from tests.calls import reference as ref
from tests.calls.operators import Call as Run
from tests.calls.operators import through
from tests.calls.tensors import BF16, FP32, drawn, drawn_residual, fp64, laid_out
from tests.calls.tolerances import tolerance

LISTS = ("param", "square", "buffer", "grad", "square_residual", "weight_residual")

OPTIONS = {
    **{"batch_size": 3.0, "beta2": 0.3, "gamma": 1.0, "momentum": 0.8, "damping": 0.2},
    **{"weight_decay": 0.03, "decoupled": False, "maximize": False},
}
EXACT = {"batch_size": 1.0, "beta2": 2.0**-9, "momentum": 0.5, "damping": 0.0, "weight_decay": 0.0}

Lists = dict[str, list[Tensor]]


@dataclass
class Call:
    """A call of `rf_rmsprop`. Every run creates new tensors."""

    shapes: list[Any] = field(default_factory=lambda: [(64, 72), (5,)])
    """Shapes of the tensors; a number n stands for (n,)."""
    layouts: tuple[str, ...] = ("whole",)
    """Memory layouts (see `laid_out`). The tensors use them in rotation."""
    param: torch.dtype = FP32
    grad: torch.dtype = FP32
    square: torch.dtype = FP32
    buffer: torch.dtype = FP32
    rounding: str = "nearest"
    weight_rounding: str = "nearest"
    options: dict[str, Any] = field(default_factory=dict)
    lr: Any = 0.05
    steps: Any = 3
    grad_scale: float | None = None
    found_inf: float | None = None
    seed: int = 0
    exact: bool = False
    """Whether all FP32 arithmetic is exact in any order, fused or not. Only the rounding of results then matters."""
    alike: bool = True
    """Whether the i-th tensors of all lists share one layout. Otherwise layouts differ between the lists too."""
    apart: str = ""
    """Name of the list whose tensors start one element later in memory."""
    backend: str = "eager"
    device: Any = "cpu"

    @property
    def all_shapes(self) -> list[tuple[int, ...]]:
        return [shape if isinstance(shape, tuple) else (shape,) for shape in self.shapes]

    @property
    def sizes(self) -> list[int]:
        return [prod(shape) for shape in self.all_shapes]

    @property
    def all_options(self) -> dict[str, Any]:
        return {**OPTIONS, **(EXACT if self.exact else {}), **self.options}

    @property
    def rate(self) -> Any:
        return 2.0**-11 if self.exact else self.lr

    def draw(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw μ, g, s or m; s is positive."""
        if self.exact:
            return torch.zeros(shape) if name == "grad" else torch.randint(128, 256, shape, generator=generator) / 128
        value = drawn(shape, generator)
        return value.abs() + 0.5 if name == "square" else value

    def placed(self, name: str, index: int, value: Tensor) -> tuple[Tensor, Tensor]:
        """Copy `value` to its layout; return the copy and the memory around it."""
        layout = self.layouts[(index + (0 if self.alike else LISTS.index(name))) % len(self.layouts)]
        return laid_out(value, layout, self.device, shift=int(name == self.apart))

    def tensors(self) -> tuple[Lists, list[tuple[Tensor, Tensor]]]:
        """Return {"param": [n tensors], …}, and pairs of each tensor and the memory around it."""
        generator = torch.Generator().manual_seed(self.seed)
        lists: Lists = {}
        memory = []
        for name in ("param", "square", "buffer", "grad"):
            values = [self.draw(name, shape, generator).to(getattr(self, name)) for shape in self.all_shapes]
            places = [self.placed(name, index, value) for index, value in enumerate(values)]
            lists[name] = [x for x, _ in places]
            memory += places
        lists["skipped"] = [torch.full((), i, dtype=torch.int32, device=self.device) for i in range(len(self.shapes))]
        for name, like, mode in (("square", "square", self.rounding), ("weight", "param", self.weight_rounding)):
            shapes = self.all_shapes if getattr(self, like) == BF16 and mode == "compensated" else []
            values = [drawn_residual(shape, generator, 2000) for shape in shapes]
            places = [self.placed(f"{name}_residual", index, value) for index, value in enumerate(values)]
            lists[f"{name}_residual"] = [x for x, _ in places]
            memory += places
        return lists, memory

    def arguments(self, lists: Lists) -> tuple[Any, ...]:
        """Return the flat arguments of the operator."""
        n = len(self.shapes)
        seeds = (torch.arange(n) * 0x1234567 - 3).to(self.device, torch.int32)
        steps = self.steps if isinstance(self.steps, Tensor) else torch.full((n,), self.steps)
        scalars = [
            None if x is None else torch.tensor(x, device=self.device) for x in (self.grad_scale, self.found_inf)
        ]
        lr = self.rate if isinstance(self.rate, Tensor) else torch.tensor(self.rate, dtype=torch.float64)
        return (
            *(lists["param"], lists["square"], lists["buffer"], lists["skipped"]),
            *(lists["square_residual"], lists["weight_residual"], lists["grad"]),
            *(lr, seeds, steps, *scalars, *self.all_options.values(), self.rounding, self.weight_rounding),
        )

    def run(self, lists: Lists | None = None, run: Run | None = None) -> Lists:
        """Run a step with the call's backend, or with `run`, and return the tensors."""
        lists = lists or self.tensors()[0]
        (run or through(self.backend))("rf_rmsprop", *self.arguments(lists))
        return lists


def values(lists: Lists, name: str) -> list[np.ndarray]:
    """Return the values of a list in FP64. Compensated pairs are joined exactly."""
    found, residuals = lists[name], lists.get({"param": "weight_residual"}.get(name, f"{name}_residual"), [])
    if residuals:
        found = [rnd.join_compensated(hi, lo) for hi, lo in zip(found, residuals, strict=True)]
    return [fp64(x) for x in found]


def counts(lists: Lists) -> list[int]:
    """Return how often each tensor was skipped."""
    return [int(x.item()) for x in lists["skipped"]]


def copied(lists: Lists) -> Lists:
    return {name: [x.clone() for x in tensors] for name, tensors in lists.items()}


def flat(lists: Lists) -> Lists:
    """Return copies of all tensors, flattened in row-major order."""
    return {name: [x.reshape(-1).clone() for x in tensors] for name, tensors in lists.items()}


def bits(lists: Lists) -> dict[str, list[bytes]]:
    return {
        name: [x.cpu().view(torch.uint8).numpy().tobytes() for x in tensors] for name, tensors in flat(lists).items()
    }


def assert_equal(actual: Lists, expected: Lists) -> None:
    """Check that all elements of two runs are equal. Zeros may differ in sign."""
    for name in expected:
        for index, (x, y) in enumerate(zip(actual[name], expected[name], strict=True)):
            x, y = x.cpu(), y.cpu()  # compare on the host: the fake GPU computes nothing
            assert x.equal(y), f"{name}[{index}] of {tuple(x.shape)} differs in {(x != y).sum().item()} elements"


# ---- expected results --------------------------------------------------------------------------------------------


def assert_matches_reference(call: Call, lists: Lists, before: Lists) -> None:
    """Check `lists` after a step from `before` against the reference, within the tolerance of the stored dtypes."""
    options = {"lr": call.rate, **call.all_options}
    stored = {
        "param": FP32 if lists["weight_residual"] else call.param,
        "square": FP32 if lists["square_residual"] else call.square,
        "buffer": call.buffer,
    }
    old, new = ({name: values(x, name) for name in (*stored, "grad")} for x in (before, lists))
    for index, size in enumerate(call.sizes):
        state = ref.DiagonalState(old["square"][index], old["buffer"][index])
        grad = old["grad"][index] / (call.grad_scale or 1)
        weight, state = ref.diagonal_step(old["param"][index], grad, state, **options)
        for name, expected in (("param", weight), ("square", state.square), ("buffer", state.buffer)):
            error, norm = np.linalg.norm(new[name][index] - expected), np.linalg.norm(expected)
            allowed = tolerance("one step", stored[name]) * norm
            cancelled = 2e-6 * size**0.5  # rounding errors of terms, which have magnitude 1
            assert error <= allowed + cancelled, f"{name}[{index}] of {size} elements"


def fp32_values(call: Call, grad: Tensor, s: Tensor, m: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Return new s, m and weights, computed in FP32 without fused operations, and the mask of stepped elements."""
    options = call.all_options
    kappa, lr = options["weight_decay"], torch.tensor(call.rate)
    g = grad * (torch.tensor(-1.0 if options["maximize"] else 1.0) / (call.grad_scale or 1.0))
    new_s = s * (1 - options["beta2"] * options["gamma"]) + g * (options["beta2"] * options["batch_size"]) * g
    direction = g / (new_s + options["damping"])
    keep = (new_s + direction).isfinite()
    new_m, new_w = m * options["momentum"] + direction, w
    if kappa and options["decoupled"]:
        new_w = w - w * (lr * torch.tensor(kappa))
    elif kappa:
        new_m = new_m + w * kappa
    new_w = new_w - lr * new_m
    return new_s.where(keep, s), new_m.where(keep, m), new_w.where(keep, w), keep


def fp32_step(call: Call, lists: Lists) -> Lists:
    """Step `lists` in place in FP32 without fused operations, with the options of `call`; return them."""
    seeds, steps = call.arguments(lists)[8:10]
    square_bits = rnd.RaggedBits(seeds, steps, rnd.SLOT_SQUARE, call.sizes)().split(call.sizes)
    weight_bits = rnd.RaggedBits(seeds, steps, rnd.SLOT_WEIGHT, call.sizes)().split(call.sizes)
    for index in range(len(call.shapes)):
        params, squares, buffers, grads = (lists[name][index] for name in ("param", "square", "buffer", "grad"))
        square_low, weight_low = (lists[f"{name}_residual"][index : index + 1] for name in ("square", "weight"))
        old_s, old_w = loaded(squares, square_low), loaded(params, weight_low)
        s, m, w, keep = fp32_values(call, grads.float(), old_s, buffers.float(), old_w)
        buffers.copy_(m)
        store(s, squares, square_low, call.rounding, square_bits[index].view(squares.shape))
        store(w, params, weight_low, call.weight_rounding, weight_bits[index].view(params.shape))
        lists["skipped"][index].add_(int(not keep.all()))
    return lists


def loaded(value: Tensor, residual: list[Tensor]) -> Tensor:
    return rnd.join_compensated(value, residual[0]) if residual else value.float()


def store(x: Tensor, value: Tensor, residual: list[Tensor], rounding: str, bits: Tensor) -> None:
    if residual:
        high, low = rnd.split_compensated(x)
        value.copy_(high)
        residual[0].copy_(low)
    elif value.dtype == BF16 and rounding == "stochastic":
        value.copy_(rnd.round_stochastic(x, bits))
    else:
        value.copy_(x)
