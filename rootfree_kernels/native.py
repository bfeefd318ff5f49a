"""Operators of the compiled extension that work on tables of addresses, with the signatures of `rootfree_kernels.eager`
(`torch.ops.rootfree_native`, see csrc/operators.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from rootfree_kernels import eager
from rootfree_kernels.diagonal import diagonal_call
from rootfree_kernels.momentum import momentum_call
from rootfree_kernels.rounding import ROUNDINGS

CLIPS = ("frobenius", "row_sum", "none")
_ROUNDING = {mode: number for number, mode in enumerate(("nearest", "stochastic", "compensated"))}
assert set(_ROUNDING) == set(ROUNDINGS)


def rf_rmsprop_with(programs_of: Callable[[tuple[int, ...]], int]) -> Callable[..., None]:
    """`rf_rmsprop` where `programs_of` says how many programs work on a tensor, from a row of the table."""

    @wraps(eager.rf_rmsprop)
    def rf_rmsprop(params: list[Tensor], *arguments: Any) -> None:
        if not params:
            return
        call = diagonal_call(programs_of, params, *arguments)
        torch.ops.rootfree_native.rf_rmsprop_table(
            *(call.where.rows, call.grads, call.where.owners, call.where.counters),
            *(call.drawn.seeds, call.drawn.steps, call.lr, call.grad_scale, call.found_inf),
            *(call.drawn.stride, call.drawn.step_stride, call.drawn.step, call.lr_value, *call.numbers),
            *(*call.dtypes, *(_ROUNDING[mode] for mode in call.modes)),
        )
        call.finish()

    return rf_rmsprop


def clipped_momentum_with(shares_of: Callable[[int, int], tuple[int, int]]) -> Callable[..., Tensor]:
    """`clipped_momentum` where `shares_of` says how many numbers a share has and how many shares a block, from the
    block's numbers and those that a share is to hold a multiple of."""

    @wraps(eager.clipped_momentum)
    def clipped_momentum(
        momenta: list[Tensor], deltas: list[Tensor], found_inf: Tensor | None, riemannian_momentum: float, clip: str
    ) -> Tensor:
        by_rows = clip == "row_sum"  # of which a share must not hold a part
        call = momentum_call(lambda numel, cols: shares_of(numel, cols if by_rows else 1), momenta, deltas, found_inf)
        torch.ops.rootfree_native.clipped_momentum(
            *(call.where.rows, call.where.owners, call.sums, call.found_inf, call.clips),
            *(riemannian_momentum, call.dtype, CLIPS.index(clip)),
        )
        return call.finish()

    return clipped_momentum
