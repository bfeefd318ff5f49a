"""Calls of the diagonal step: what it gets, on any device, what must come of it, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import reference as ref
import torch
from tolerances import RELATIVE_ERROR
from torch import Tensor

from rootfree_kernels import rounding as rnd

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FILL = 77.0
"""What lies around the tensors in memory."""

TOLERANCE = {**RELATIVE_ERROR, BF16: 8e-3, FP16: 1e-3}  # of one step that rounds once

OPTIONS = {
    **{"batch_size": 3.0, "beta2": 0.3, "gamma": 1.0, "momentum": 0.8, "damping": 0.2},
    **{"weight_decay": 0.03, "decoupled": False, "maximize": False},
}

Lists = dict[str, list[Tensor]]


@dataclass
class Call:
    """What `rf_rmsprop` gets. Every tensor is made anew for every run."""

    sizes: list[int] = field(default_factory=lambda: [64 * 72, 5])
    offsets: list[int] = field(default_factory=lambda: [0])
    """How many numbers behind an address of 16 bytes tensors begin, by turns."""
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
    device: str = "cpu"
    apart: str = ""
    """The list whose tensors begin one number later."""

    def draw(self, name: str, size: int, generator: torch.Generator) -> Tensor:
        """Numbers for μ, g, s and m; s is positive."""
        value = torch.randn(size, generator=generator)
        return value.abs() + 0.5 if name == "square" else value

    def placed(self, name: str, index: int, value: Tensor) -> tuple[Tensor, Tensor]:
        """(a tensor of the value, all of the memory around it)."""
        first = 8 + self.offsets[index % len(self.offsets)] + (name == self.apart)
        memory = torch.full((value.numel() + 32,), FILL, dtype=value.dtype, device=self.device)
        return memory[first : first + value.numel()].copy_(value), memory

    def tensors(self) -> tuple[Lists, list[tuple[Tensor, Tensor]]]:
        """{"param": [n tensors], …}, and every tensor with the memory that it lies in."""
        generator = torch.Generator().manual_seed(self.seed)
        lists: Lists = {}
        memory = []
        for name in ("param", "square", "buffer", "grad"):
            values = [self.draw(name, size, generator).to(getattr(self, name)) for size in self.sizes]
            places = [self.placed(name, index, value) for index, value in enumerate(values)]
            lists[name] = [x for x, _ in places]
            memory += places
        lists["skipped"] = [torch.full((), i, dtype=torch.int32, device=self.device) for i in range(len(self.sizes))]
        for name, like, mode in (("square", "square", self.rounding), ("weight", "param", self.weight_rounding)):
            sizes = self.sizes if getattr(self, like) == BF16 and mode == "compensated" else []
            values = [torch.randint(-2000, 2000, (n,), dtype=torch.int16, generator=generator) for n in sizes]
            places = [self.placed(f"{name}_residual", index, value) for index, value in enumerate(values)]
            lists[f"{name}_residual"] = [x for x, _ in places]
            memory += places
        return lists, memory

    def arguments(self, lists: Lists) -> tuple[Any, ...]:
        n = len(self.sizes)
        seeds = (torch.arange(n) * 0x1234567 - 3).to(self.device, torch.int32)
        steps = self.steps if isinstance(self.steps, Tensor) else torch.full((n,), float(self.steps))
        scalars = [
            None if x is None else torch.tensor(x, device=self.device) for x in (self.grad_scale, self.found_inf)
        ]
        lr = self.lr if isinstance(self.lr, Tensor) else torch.tensor(self.lr, dtype=torch.float64)
        return (
            *(lists["param"], lists["square"], lists["buffer"], lists["skipped"]),
            *(lists["square_residual"], lists["weight_residual"], lists["grad"]),
            *(lr, seeds, steps, *scalars, *{**OPTIONS, **self.options}.values(), self.rounding, self.weight_rounding),
        )

    def run(self, function: Callable[..., Any], lists: Lists | None = None) -> Lists:
        """The tensors after a step."""
        lists = lists or self.tensors()[0]
        function(*self.arguments(lists))
        return lists


EXACT = {"batch_size": 1.0, "beta2": 2.0**-9, "momentum": 0.5, "damping": 0.0, "weight_decay": 0.0}


@dataclass
class ExactCall(Call):
    """All arithmetic is exact in FP32, in any order and fused or not: rounding alone decides the result."""

    options: dict[str, Any] = field(default_factory=lambda: EXACT)
    lr: Any = 2.0**-11

    def draw(self, name: str, size: int, generator: torch.Generator) -> Tensor:
        if name == "grad":
            return torch.zeros(size)
        return torch.randint(128, 256, (size,), generator=generator) / 128


def fp64(lists: Lists, name: str) -> list[np.ndarray]:
    """The values of a list, those of compensated pairs to the bit."""
    values, residuals = lists[name], lists.get({"param": "weight_residual"}.get(name, f"{name}_residual"), [])
    if residuals:
        values = [rnd.join_compensated(hi, lo) for hi, lo in zip(values, residuals, strict=True)]
    return [value.double().cpu().numpy() for value in values]


def counts(lists: Lists) -> list[int]:
    """How often each tensor was skipped."""
    return [int(x.item()) for x in lists["skipped"]]


def copied(lists: Lists) -> Lists:
    return {name: [x.clone() for x in tensors] for name, tensors in lists.items()}


def assert_equal(actual: Lists, expected: Lists) -> None:
    """Two runs agree in every number; of zeros, either sign."""
    for name in expected:
        for index, (x, y) in enumerate(zip(actual[name], expected[name], strict=True)):
            assert x.equal(y), f"{name}[{index}] of {x.numel()} numbers differs in {(x != y).sum().item()}"


# ---- what must come of a call ------------------------------------------------------------------------------------


def assert_is_the_reference_s(call: Call, lists: Lists, before: Lists) -> None:
    """`lists` after a step from `before` are the reference's, to within the tolerance of how they are stored."""
    options = {"lr": call.lr, **OPTIONS, **call.options}
    stored = {
        "param": FP32 if lists["weight_residual"] else call.param,
        "square": FP32 if lists["square_residual"] else call.square,
        "buffer": call.buffer,
    }
    old, new = ({name: fp64(x, name) for name in (*stored, "grad")} for x in (before, lists))
    for index, size in enumerate(call.sizes):
        state = ref.DiagonalState(old["square"][index], old["buffer"][index])
        grad = old["grad"][index] / (call.grad_scale or 1)
        weight, state = ref.diagonal_step(old["param"][index], grad, state, **options)
        for name, expected in (("param", weight), ("square", state.square), ("buffer", state.buffer)):
            error, norm = np.linalg.norm(new[name][index] - expected), np.linalg.norm(expected)
            cancelled = 2e-6 * size**0.5  # roundings of the terms, which are of the order of 1
            assert error <= TOLERANCE[stored[name]] * norm + cancelled, f"{name}[{index}] of {size} numbers"


def fp32_values(call: Call, grad: Tensor, s: Tensor, m: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """The new s, m and weights, in FP32, operation by operation; and which numbers step."""
    options = {**OPTIONS, **call.options}
    kappa, lr = options["weight_decay"], torch.tensor(call.lr)
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
    """What `call` makes of `lists` where no operation is fused: arithmetic in FP32, and what is stored of it."""
    seeds, steps = call.arguments(lists)[8:10]
    square_bits = rnd.RaggedBits(seeds, steps, rnd.SLOT_SQUARE, call.sizes)().split(call.sizes)
    weight_bits = rnd.RaggedBits(seeds, steps, rnd.SLOT_WEIGHT, call.sizes)().split(call.sizes)
    for index in range(len(call.sizes)):
        params, squares, buffers, grads = (lists[name][index] for name in ("param", "square", "buffer", "grad"))
        square_low, weight_low = (lists[f"{name}_residual"][index : index + 1] for name in ("square", "weight"))
        old_s, old_w = loaded(squares, square_low), loaded(params, weight_low)
        s, m, w, keep = fp32_values(call, grads.float(), old_s, buffers.float(), old_w)
        buffers.copy_(m)
        store(s, squares, square_low, call.rounding, square_bits[index])
        store(w, params, weight_low, call.weight_rounding, weight_bits[index])
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
