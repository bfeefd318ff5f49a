"""Operators of the compiled extension that take tables of addresses (`torch.ops.rootfree_native`, csrc/operators.cpp).

The functions made here have the signatures of `rootfree_kernels.eager`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rootfree_kernels.arguments import DiagonalOptions, DiagonalState, Draws, Scaling
from rootfree_kernels.pointer_tables.clipped_momentum import momentum_call
from rootfree_kernels.pointer_tables.rf_rmsprop import diagonal_call
from rootfree_kernels.rounding import ROUNDINGS

CLIPS = ("frobenius", "row_sum", "none")
_ROUNDING = {mode: number for number, mode in enumerate(("nearest", "stochastic", "compensated"))}
assert set(_ROUNDING) == set(ROUNDINGS)


def rf_rmsprop_with(programs_of: Callable[[tuple[int, ...]], int]) -> Callable[..., None]:
    """Return `rf_rmsprop`. `programs_of` returns how many programs work on a tensor, from its row of the table."""

    def rf_rmsprop(
        params: list[Tensor],
        state: DiagonalState,
        grads: list[Tensor],
        lr: Tensor,
        draws: Draws,
        scaling: Scaling,
        options: DiagonalOptions,
    ) -> None:
        """Step n tensors in place: see `rootfree_kernels.eager.rf_rmsprop`."""
        if not params:
            return
        call = diagonal_call(programs_of, params, state, grads, lr, draws, scaling, options)
        torch.ops.rootfree_native.rf_rmsprop_table(
            *(call.where.rows, call.grads, call.where.owners, call.where.counters),
            *(call.bits.seeds, call.bits.steps, call.lr, call.grad_scale, call.found_inf),
            *(call.bits.stride, call.bits.step_stride, call.bits.step, call.lr_value, *call.scalars),
            *(*call.dtypes, *(_ROUNDING[mode] for mode in call.modes)),
        )
        call.finish()

    return rf_rmsprop


def clipped_momentum_with(shares_of: Callable[[int, int], tuple[int, int]]) -> Callable[..., Tensor]:
    """Return `clipped_momentum`.

    `shares_of` takes the elements of a block, and a number of elements that a share must hold a multiple of. It returns
    the elements of a share and the shares of a block.
    """

    def clipped_momentum(
        momenta: list[Tensor], deltas: list[Tensor], found_inf: Tensor | None, riemannian_momentum: float, clip: str
    ) -> Tensor:
        """Update the momenta in place and return the clip factors: see `rootfree_kernels.eager.clipped_momentum`."""
        by_rows = clip == "row_sum"  # a share must then hold whole rows
        call = momentum_call(lambda numel, cols: shares_of(numel, cols if by_rows else 1), momenta, deltas, found_inf)
        torch.ops.rootfree_native.clipped_momentum(
            *(call.where.rows, call.where.owners, call.sums, call.found_inf, call.clips),
            *(riemannian_momentum, call.dtype, CLIPS.index(clip)),
        )
        return call.finish()

    return clipped_momentum
