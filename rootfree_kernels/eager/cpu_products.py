"""In which dtype a CPU multiplies BF16 factors: measured once in a process, when it is first asked for.

A processor's flags do not say whether BF16 is fast. Where it has no instructions for BF16, or where they serve only
some of a library's products, a BF16 product takes longer than an FP32 one. `python -m rootfree_kernels` prints the
ratio.
"""

from __future__ import annotations

from functools import cache
from time import perf_counter
from typing import NamedTuple

import torch

SIDES, ROUNDS = (128, 256), 5
"""The sides of the matrices that are multiplied, and how often: a few milliseconds in all."""

CLEARLY_SLOWER = 4.0
"""From this ratio of times on, larger matrices are not tried. On CPUs that lack the instructions PyTorch multiplies
BF16 in plain loops, and a larger product would take seconds."""

CLEARLY_FASTER = 0.8
"""BF16 is chosen up to this ratio of times. A tie would be decided by noise, differently in every process."""


class Probe(NamedTuple):
    """The shortest times of one product, in seconds."""

    side: int  # of the matrices
    bf16: float
    fp32: float

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which BF16 factors are multiplied."""
        return torch.bfloat16 if self.bf16 <= CLEARLY_FASTER * self.fp32 else torch.float32

    def __str__(self) -> str:
        ratio = self.bf16 / self.fp32
        return f"a BF16 product of {self.side} x {self.side} took {ratio:.2f} times as long as an FP32 one"


@cache
def probe() -> Probe:
    """Time products of PyTorch's library in both dtypes, in turns, with the present number of threads."""
    # A mode of the caller, such as one for fake tensors, would time something else, and autocast would change dtypes.
    with torch._C._DisableTorchDispatch(), torch.autocast("cpu", enabled=False), torch.no_grad():
        for side in SIDES:
            measured = _measured(side)
            if measured.bf16 > CLEARLY_SLOWER * measured.fp32:
                break
    return measured


def _measured(side: int) -> Probe:
    dtypes = torch.bfloat16, torch.float32
    operands = [torch.ones(1, side, side, dtype=dtype, device="cpu") for dtype in dtypes]
    results = [torch.bmm(x, x) for x in operands]  # the library prepares a kernel for the shape
    times = [[_seconds(*pair) for pair in zip(operands, results, strict=True)] for _ in range(ROUNDS)]
    return Probe(side, *map(min, zip(*times, strict=True)))


def _seconds(x: torch.Tensor, out: torch.Tensor) -> float:
    begin = perf_counter()
    torch.bmm(x, x, out=out)
    return perf_counter() - begin


def cpu_matmul_dtype(factor_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which PyTorch's libraries multiply factors fastest: FP32 for BF16 ones on some CPUs."""
    if device.type == "cpu" and factor_dtype == torch.bfloat16:
        return probe().dtype
    return factor_dtype
