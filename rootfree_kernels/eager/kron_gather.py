"""G [L, p, d] of a batch of blocks, from the gradients of their parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from rootfree_kernels.arguments import Gathered, Tiling
from rootfree_kernels.blocks import tiled_blocks


def padded_side(size: int) -> int:
    """Return the side of G for a block side of `size`: the same, since eager PyTorch does not pad."""
    return size


def num_partial_sums(rows: int, cols: int) -> int:
    """Return how many sums of squares `kron_gather` leaves for each block: none."""
    return 0


def kron_gather(
    grads: list[Tensor],  # each [rows of its parameter, columns], any dtype and strides, or with more axes
    tiling: Tiling,
    factors: list[Tensor],  # [C, K] if the coming update damps by them, otherwise empty
    grad_scale: Tensor | None,  # one element
    dtype: torch.dtype,
    maximize: bool,
) -> Gathered:
    """Return the blocks of one tile of each gradient as G [L, p, d] in `dtype`, divided by `grad_scale`.

    `Gathered.squares` belongs to the backend, which passes it on to `kron_factor` and `kron_step`: kernels sum up the
    squares of G on the way, and those of the `factors` that an update needs for its damping. Eager PyTorch leaves it
    empty and computes norms where it needs them.
    """
    rows, cols = tiling.rows, tiling.cols
    (blocks,) = tiled_blocks([grads], *tiling)
    if all(block.dtype == dtype for block in blocks):
        batch = torch.stack(blocks)
    else:  # cast while copying, so that no second copy is made
        batch = blocks[0].new_empty((len(blocks), rows, cols), dtype=dtype)
        torch._foreach_copy_(list(batch.unbind()), blocks)
    if grad_scale is not None:
        batch.div_(grad_scale.reshape(()))
    squares = batch.new_empty((1 + len(factors), len(blocks), 0), dtype=torch.float32)
    return Gathered(batch.neg_() if maximize else batch, squares)
