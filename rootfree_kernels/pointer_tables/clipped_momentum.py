"""What the kernels of `clipped_momentum` are handed, Triton's, CUDA's and C++'s: a table of the sides of a batch, and
memory for norms and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.pointer_tables.memory_order import match_layout, without_negation, write_back
from rootfree_kernels.pointer_tables.tables import TensorTable, on_device, tensor_table


class MomentumCall(NamedTuple):
    """The arguments of the kernels, and what has to be done after their launch."""

    # A share is the part of a block that one program works on. Columns: addresses of m and Δ; elements of a block, of
    # its last axis and of a share; shares of a block; number of programs; first program.
    where: TensorTable
    sums: Tensor  # [programs]: the norms of shares
    clips: Tensor  # [sides, L], the result
    found_inf: Tensor
    dtype: torch.dtype  # of m
    momenta: Sequence[Tensor]
    deltas: Sequence[Tensor]  # what the kernels read; copies among them must live until the kernels have run
    copies: Sequence[Tensor]  # what the kernels work on: the momenta, or copies of those with another layout

    def finish(self) -> Tensor:
        """Tell autograd what was changed, write copies back, and return the result."""
        torch.autograd.graph.increment_version([*self.copies])
        write_back([self.momenta], [self.copies])
        return self.clips


def momentum_call(
    shares_of: Callable[[int, int], tuple[int, int]],
    momenta: list[Tensor],
    deltas: Sequence[Tensor],
    found_inf: Tensor | None,
) -> MomentumCall:
    """Return the call of kernels with the arguments of `rootfree_kernels.eager.clipped_momentum`.

    `momenta` are FP32 or BF16 [L, …], `deltas` FP32 of the same shapes; `deltas` are not changed. `shares_of` takes the
    elements of a block and of its last axis, and returns the elements of a share and the shares of a block.
    """
    num_blocks, device = deltas[0].shape[0], deltas[0].device
    deltas = without_negation(deltas)
    mixed = len({m.dtype for m in momenta}) > 1
    copies = match_layout(([m.float() for m in momenta] if mixed else momenta, deltas), in_any_order=False)
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
    """Return (elements of a share, shares) of a block of `numel` elements. A share is the smallest multiple of `unit`
    elements that has at least `least`."""
    size = -(-least // unit) * unit
    return size, max(1, -(-numel // size))


def _num_programs(row: tuple[int, ...]) -> int:
    return row[-1]
