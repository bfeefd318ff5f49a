"""The CUDA room: the diagonal step and the clipped momentum of lists of tensors on a GPU (csrc/cuda).

One launch serves hundreds of tensors, two serve the momentum of a batch. For machines without Triton, and for lists of
small tensors, whose launch costs less here. Matrices are Triton's or PyTorch's.
"""

from __future__ import annotations

import torch

import rootfree_kernels._C  # noqa: F401  registers the operators
from rootfree_kernels.momentum import cut
from rootfree_kernels.native import clipped_momentum_with, rf_rmsprop_with

CHUNK: int = torch.ops.rootfree_native.cuda_chunk()
"""Numbers of a tensor that a program of the diagonal step works on."""

MIN_SHARE, MAX_SHARES = 4096, 512
"""Numbers, at least, of a share of a block whose norm is summed up; shares of a block, at most."""

ROWS, TILE = 8, 2048
"""What the kernels of the clipped momentum work on at a time: rows of a row sum, numbers of any other norm."""


def _num_programs(row: tuple[int, ...]) -> int:
    return -(-row[-1] // CHUNK)  # the last column is the size


def _shares(numel: int, unit: int) -> tuple[int, int]:
    return cut(numel, max(MIN_SHARE, -(-numel // MAX_SHARES)), TILE if unit == 1 else ROWS * unit)


rf_rmsprop = rf_rmsprop_with(_num_programs)
clipped_momentum = clipped_momentum_with(_shares)
