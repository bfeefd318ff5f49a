"""What the machine can do, and what an optimizer asks of it: below the larger of two times no step can be.

The bandwidth is that of `copy_`, the rates those of a matrix product, FP32 without TF32. Operations and bytes are those
of the launches in `bench.common.gpt2`; only for optimizers of which it is known what they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.common.gpt2 import Work, diagonal_bytes, random_tensors, step_stages, total, update_stages
from bench.common.optimizers import Entry
from bench.common.timing import Timer
from bench.common.workloads import Workload
from bench.compare.contest import UPDATE


@dataclass(frozen=True)
class Roofline:
    """Bytes read and written a second, and floating-point operations a second by dtype."""

    bandwidth: float
    fp32: float
    bf16: float

    def rate(self, dtype: torch.dtype) -> float:
        """Of products of this dtype; FP32's for all but BF16."""
        return self.bf16 if dtype == torch.bfloat16 else self.fp32

    def limit(self, work: Work, dtype: torch.dtype) -> float:
        """µs below which the work cannot be done."""
        return max(work.bytes / self.bandwidth, work.flops / self.rate(dtype)) * 1e6


def measure(timer: Timer, device: torch.device, numbers: int, side: int) -> Roofline:
    """A copy of `numbers` FP32 numbers, and products of side × side."""
    source, target = random_tensors([(numbers,)] * 2, device)
    calls: dict[str, Any] = {"copy": [partial(target.copy_, source)]}
    for dtype in (torch.float32, torch.bfloat16):
        for name, product in products(side, dtype, device).items():
            calls[f"{dtype} {name}"] = [product]
    found = {name: measured.total.median for name, measured in timer.measure(calls).items()}

    def rate(dtype: torch.dtype) -> float:
        return 2e6 * side**3 / min(time for name, time in found.items() if name.startswith(str(dtype)))

    return Roofline(8e6 * numbers / found["copy"], rate(torch.float32), rate(torch.bfloat16))


def products(side: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Products of two matrices by every library at hand: on a CPU that of `torch.mm` and oneDNN."""
    a, b = random_tensors([(side, side)] * 2, device, dtype)
    found: dict[str, Callable[[], Any]] = {"mm": partial(torch.mm, a, b)}
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        found["oneDNN"] = partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], "")
    return found


def work_of(entry: Entry, workload: Workload, block: int, kind: str) -> tuple[Work, torch.dtype] | None:
    """What a step of an entry has to do and the dtype of its products; None where that is not known."""
    if entry.name.startswith("IFShampoo") and entry.option("direction") != "whitened":
        return _if_shampoo(entry, workload, block, kind)
    if entry.family == "diagonal":
        return _diagonal(entry, workload), torch.float32
    return None


def _if_shampoo(entry: Entry, workload: Workload, block: int, kind: str) -> tuple[Work, torch.dtype]:
    dtype = entry.option("factor_dtype") or torch.bfloat16
    factor, weight = dtype.itemsize, entry.weights.itemsize
    work = Work()
    for p, d in workload.blocks(block):
        stages = step_stages(p, d, grad_bytes=weight, weight_bytes=weight, factor_bytes=factor)
        if kind == UPDATE:
            stages |= update_stages(p, d, grad_bytes=weight, factor_bytes=factor)
        work += total(stages)
    return work, dtype


def _diagonal(entry: Entry, workload: Workload) -> Work:
    if entry.name.startswith("SGD"):
        return Work(0, 20 * workload.num_weights)  # weight and momentum read and written, gradient read
    state = entry.option("state_dtype") or entry.weights  # theirs have it of the weights' dtype
    bytes_ = diagonal_bytes(entry.weights, entry.weights, state)
    if entry.option("rounding") == "compensated":
        bytes_ += 4  # the remainder of s, read and written
    return Work(0, bytes_ * workload.num_weights)
