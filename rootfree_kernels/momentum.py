"""What every kernel of the clipped momentum is handed, by Triton, CUDA and C++ alike: a table of the sides of a batch,
and memory for norms and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.memory_order import alike, without_negation, write_back
from rootfree_kernels.tables import TensorTable, on_device, tensor_table


class MomentumCall(NamedTuple):
    """The arguments of the kernels, and what has to be done when they have been launched."""

    # Addresses of m and Δ; numbers of a block, of its last axis, of a share; shares of a block; number of programs;
    # first program.
    where: TensorTable
    sums: Tensor  # [programs], for the norms of shares
    clips: Tensor  # [sides, L], the result
    found_inf: Tensor
    dtype: torch.dtype  # of m
    momenta: Sequence[Tensor]
    deltas: Sequence[Tensor]  # what the kernels read, kept so that copies live until they have run
    copies: Sequence[Tensor]  # what the kernels work on: the same tensors, but for those that lie otherwise

    def finish(self) -> Tensor:
        """Tell autograd what was changed, copy back what had to be copied, and give the result."""
        torch.autograd.graph.increment_version([*self.copies])
        write_back([self.momenta], [self.copies])
        return self.clips


def momentum_call(
    shares_of: Callable[[int, int], tuple[int, int]],
    momenta: list[Tensor],
    deltas: Sequence[Tensor],
    found_inf: Tensor | None,
) -> MomentumCall:
    """The call of kernels with the arguments of `rootfree_kernels.eager.clipped_momentum`.

    `momenta` are FP32 or BF16 [L, …], `deltas` FP32 of the same shapes; they stay as they are. `shares_of` gives, of
    the numbers of a block and those of its last axis, the numbers of a share and the shares of a block.
    """
    num_blocks, device = deltas[0].shape[0], deltas[0].device
    deltas = without_negation(deltas)
    mixed = len({m.dtype for m in momenta}) > 1
    copies = alike(([m.float() for m in momenta] if mixed else momenta, deltas), in_any_order=False)
    rows = []
    for m, delta in zip(*copies, strict=True):
        numel, cols = delta[0].numel() if num_blocks else 0, max(1, delta.shape[-1])
        size, shares = shares_of(numel, cols)
        rows.append((m.data_ptr(), delta.data_ptr(), numel, cols, size, shares, num_blocks * shares))
    where = tensor_table(tuple(zip(*rows, strict=True)), _num_programs, device)
    return MomentumCall(
        where,
        torch.empty(where.num_programs, dtype=torch.float32, device=device),
        torch.empty((len(deltas), num_blocks), dtype=torch.float32, device=device),
        on_device(device, found_inf, 0.0),
        copies[0][0].dtype,
        momenta,
        copies[1],
        copies[0],
    )


def cut(numel: int, least: int, unit: int) -> tuple[int, int]:
    """(numbers of a share, shares) of a block of `numel` numbers; a share is a multiple of `unit` numbers, the first
    that is not below `least`."""
    size = -(-least // unit) * unit
    return size, max(1, -(-numel // size))


def _num_programs(row: tuple[int, ...]) -> int:
    return row[-1]
