"""The CUDA operators for GPUs (csrc/cuda): the diagonal step and the clipped momentum of lists of tensors.

The diagonal step of hundreds of tensors is one launch, the clipped momentum of a batch is two. They serve machines
without Triton, and lists of small tensors, whose launch costs less here. Matrices are left to Triton and PyTorch. The
scaled diagonal step has no CUDA kernel; it is that of eager PyTorch.
"""

from __future__ import annotations

import torch

import rootfree_kernels._C  # noqa: F401  registers the operators
from rootfree_kernels.eager import scaled_rmsprop
from rootfree_kernels.native.table_calls import clipped_momentum_with, rf_rmsprop_with
from rootfree_kernels.pointer_tables.clipped_momentum import cut

__all__ = ["clipped_momentum", "rf_rmsprop", "scaled_rmsprop"]

CHUNK: int = torch.ops.rootfree_native.cuda_chunk()
"""Elements of a tensor that one program of the diagonal step works on."""

MIN_SHARE, MAX_SHARES = 4096, 512
"""The fewest elements of a share, the part of a block whose norm one program sums up; the most shares of a block."""

ROWS, TILE = 8, 2048
"""What the kernels of the clipped momentum work on at a time: rows for a row sum, elements for any other norm."""


def _num_programs(row: tuple[int, ...]) -> int:
    return -(-row[-1] // CHUNK)  # the last column is the size


def _shares(numel: int, unit: int) -> tuple[int, int]:
    return cut(numel, max(MIN_SHARE, -(-numel // MAX_SHARES)), TILE if unit == 1 else ROWS * unit)


rf_rmsprop = rf_rmsprop_with(_num_programs)
clipped_momentum = clipped_momentum_with(_shares)
