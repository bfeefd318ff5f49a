"""The roofline of a device, and the work of a step: operations and bytes that bound its time from below.

The bandwidth is that of `copy_`, the rates are those of a matrix product, in FP32 without TF32. Each launch reads its
inputs and writes its outputs once. A multiplication and an addition are two operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch

from bench.common.gpt import GPT2
from bench.common.tensors import random_tensors
from bench.common.timing import Timer, Timing
from rootfree_kernels.blocks import tiles

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes to and from memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


def total(work: Mapping[str, Work]) -> Work:
    return sum(work.values(), Work())


@dataclass(frozen=True)
class Roofline:
    """Bytes read and written a second, and floating-point operations a second by dtype (NaN if not measured)."""

    bandwidth: float
    fp32: float = math.nan
    bf16: float = math.nan

    @classmethod
    def of(cls, times: Mapping[str, Timing], numbers: int, side: int) -> Roofline:
        """Return the roofline that the times of `measure_times` show."""

        def rate(dtype: torch.dtype) -> float:
            found = [time.median for name, time in times.items() if name.startswith(str(dtype))]
            return 2e6 * side**3 / min(found, default=math.nan)

        return cls(8e6 * numbers / times["copy"].median, rate(FP32), rate(BF16))

    def rate(self, dtype: torch.dtype) -> float:
        """Return the rate of products of a dtype: FP32's for all but BF16."""
        return self.bf16 if dtype == BF16 else self.fp32

    def limit(self, work: Work, dtype: torch.dtype = BF16) -> float:
        """Return the least time of some work in µs: the larger of moving its bytes and doing its operations."""
        seconds = work.bytes / self.bandwidth
        return max(seconds, work.flops / self.rate(dtype) if work.flops else 0.0) * 1e6


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure(timer: Timer, device: torch.device, numbers: int, side: int) -> Roofline:
    """Measure a copy of `numbers` FP32 numbers and products of side × side."""
    return Roofline.of(measure_times(timer, device, numbers, side), numbers, side)


def measure_times(
    timer: Timer, device: torch.device, numbers: int, side: int, dtypes: tuple[torch.dtype, ...] = (FP32, BF16)
) -> dict[str, Timing]:
    """Return the times of the copy ("copy") and of the products ("torch.bfloat16 mm"), which take turns."""
    source, target = random_tensors([(numbers,)] * 2, device)
    calls: dict[str, Any] = {"copy": [partial(target.copy_, source)]}
    for dtype in dtypes:
        calls |= {f"{dtype} {name}": [product] for name, product in products(side, dtype, device).items()}
    return {name: measured.total for name, measured in timer.measure(calls).items()}


def products(side: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return a product of two matrices by every library at hand: on a CPU `torch.mm` and oneDNN."""
    a, b = random_tensors([(side, side)] * 2, device, dtype)
    found: dict[str, Callable[[], Any]] = {"mm": partial(torch.mm, a, b)}
    if device.type == "cpu" and dtype == FP32 and torch.backends.mkldnn.is_available():
        found["oneDNN"] = partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], "")
    return found


# ---- the diagonal method -------------------------------------------------------------------------------------------


def diagonal_bytes(param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> int:
    """Return the bytes a number of RF-RMSProp or Adam: four tensors are read and all but the gradient written."""
    return 2 * param.itemsize + grad.itemsize + 4 * state.itemsize


def scaled_bytes(param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> int:
    """Return the bytes a number of the recipe's diagonal step in three passes, each of which reads the gradient.

    The second reads s and m and writes s. The third reads s, m and the weight and writes m and the weight.
    """
    return 2 * param.itemsize + 3 * grad.itemsize + 6 * state.itemsize


def momentum_bytes(momentum: torch.dtype, passes: int = 1) -> int:
    """Return the bytes a number of the clipped momentum: m and an FP32 Δ are read in every pass, m is written once.

    The norm must be known before m may change, so two passes are needed.
    """
    return passes * (momentum.itemsize + 4) + momentum.itemsize


# ---- the launches of the Kronecker-factored method, on a block of p × d --------------------------------------------


def update_stages(p: int, d: int, grad_bytes: int = 4, factor_bytes: int = 2) -> dict[str, Work]:
    """Return the launches of an update of the factors. Symmetric products count half.

    Without the gather these are 3pd(p+d) + 4(p³+d³) operations: 14n³.
    """
    pd, squares, cubes, size = p * d, p * p + d * d, p**3 + d**3, factor_bytes
    return {
        "gather": Work(0, grad_bytes * pd + size * (pd + squares)),  # ‖C‖ and ‖K‖ are taken on the way
        "CᵀG": Work(2 * p * pd, size * (p * p + 2 * pd)),
        "·K": Work(2 * d * pd, size * (d * d + 2 * pd)),
        "momentum": Work(pd * (p + d) + cubes, size * (pd + 3 * squares)),  # A, C, K, m, new m
        "factor": Work(2 * cubes, 4 * size * squares),  # old and new factor, new m, m
        "products": Work(cubes, 3 * size * squares),  # new factor, product, factor
    }


TILE = 128
"""Rows and columns of a tile of m. With clip="row_sum" the kernel writes one sum a row of each tile."""


def row_sums(p: int, d: int) -> Work:
    """Return the work of writing or reading the FP32 row sums of all tiles of m_C and m_K."""
    return Work(0, 4 * sum(n * -(-n // TILE) for n in (p, d)))


def row_sum_stages(p: int, d: int) -> dict[str, Work]:
    """Return the launches of an update with clip="row_sum": one more than in `update_stages` reads the row sums."""
    stages, sums = update_stages(p, d), row_sums(p, d)
    stages["momentum"] += sums
    last = {name: stages.pop(name) for name in ("factor", "products")}
    return {**stages, "norms": sums, **last}


def recipe_update_stages(p: int, d: int) -> dict[str, Work]:
    """Return the launches of an update of the recipe, whose damping takes no product and which keeps no P_C and P_K.

    "start" reads the diagonals of the factors. "copy" is no launch of ours: `torch._foreach_copy_` of C' and K'.
    """
    pd, squares, cubes, size = p * d, p * p + d * d, p**3 + d**3, 2
    plain = update_stages(p, d)
    return {
        "gather": Work(0, (4 + size) * pd),
        "start": Work(0, size * (p + d)),
        "CᵀG": plain["CᵀG"],
        "·K": plain["·K"],
        "momentum": Work(pd * (p + d), plain["momentum"].bytes) + row_sums(p, d),
        "norms": row_sums(p, d),
        "whiten": Work(2 * cubes, 4 * size * squares),  # half of C·m' and of m'·C; old and new factor, new m, m
        "copy": Work(0, 2 * size * squares),
    }


def step_stages(p: int, d: int, grad_bytes: int = 4, weight_bytes: int = 4, factor_bytes: int = 2) -> dict[str, Work]:
    """Return the launches of a step with kept P_C and P_K, gather included: 2pd(p+d) operations."""
    pd, size = p * d, factor_bytes
    return {
        "gather": Work(0, (grad_bytes + size) * pd),
        "P_C·G": Work(2 * p * pd, size * (p * p + 2 * pd)),
        "step": Work(2 * d * pd, size * (pd + d * d) + 2 * weight_bytes * pd + 8 * pd),  # weight and FP32 momentum
    }


def recipe_step_stages(p: int, d: int) -> dict[str, Work]:
    """Return the launches of a step of the recipe, gather included: momentum of the gradient, U, its norm, the step."""
    pd, size = p * d, 2
    return {
        "gather": Work(0, (4 + size) * pd),
        "average": Work(0, (8 + 2 * size) * pd),
        "C·M": Work(2 * p * pd, size * (p * p + 2 * pd)),
        "·K": Work(2 * d * pd, size * (d * d + 2 * pd)),
        "size": Work(0, size * pd),
        "apply": Work(0, (8 + size) * pd),
    }


def least_update_bytes(p: int, d: int, with_products: bool = True) -> int:
    """Return the bytes of an update by one imaginary launch: gradient and state read once, state written once."""
    return 4 * p * d + (10 if with_products else 8) * (p * p + d * d)


def least_step_bytes(p: int, d: int) -> int:
    """Return the bytes of a step by one imaginary launch: weights, momentum, gradient and two matrices."""
    return 20 * p * d + 2 * (p * p + d * d)


def whole_step(model: GPT2, update: bool) -> Work:
    """Return a step of IF-Shampoo with BF16 factors and FP32 weights over a whole model.

    It steps the blocks, and the vectors diagonally. The G of an update serves the step as well.
    """
    work = Work()
    for (p, d), count in model.blocks().items():
        work += total(step_stages(p, d) | (update_stages(p, d) if update else {})) * count
    vectors = sum(prod(shape) for shape in model.shapes().values() if not tiles(shape, None))
    return work + Work(0, diagonal_bytes(FP32, FP32, FP32) * vectors)
