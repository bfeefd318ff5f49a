"""The C++ operators for CPUs (csrc/cpu), with the signatures of `rootfree_kernels.eager`.

The diagonal step, the gather, the epilogues of an update and the step of the weights are one pass over memory each, in
the widest instructions of the processor. A norm that scales an update takes one more. Matrix products are left to
PyTorch's libraries.
"""

from __future__ import annotations

import torch
from torch import Tensor

import rootfree_kernels._C  # noqa: F401  registers the operators
from rootfree_kernels import ranges
from rootfree_kernels.arguments import (
    DiagonalOptions,
    DiagonalState,
    Draws,
    FactorOptions,
    Factors,
    Gathered,
    Preconditioner,
    ScaledOptions,
    ScaledState,
    Scaling,
    StepOptions,
    Tiling,
    Weights,
)
from rootfree_kernels.native.table_calls import clipped_momentum_with
from rootfree_kernels.pointer_tables.clipped_momentum import cut

SHARE = 1 << 14
"""Elements of a block that the clipped momentum sums up at a time."""

SHARE_ROWS = 64
"""Rows of a block whose squares `kron_gather` sums up at a time (`share_rows` in csrc/cpu/kron_gather.cpp)."""

_native = torch.ops.rootfree_native
_rf_rmsprop, _scaled_rmsprop = _native.rf_rmsprop.default, _native.scaled_rmsprop.default
_kron_gather, _kron_factor = _native.kron_gather.default, _native.kron_factor.default
_kron_step, _kron_products = _native.kron_step.default, _native.kron_products.default


def padded_side(size: int) -> int:
    """Return the side of G for a block side of `size`: the same, since nothing is padded."""
    return size


def num_partial_sums(rows: int, cols: int) -> int:
    """Return how many sums of squares `kron_gather` leaves for each block: one for every few rows."""
    return -(-max(rows, cols) // SHARE_ROWS)


def _shares(numel: int, unit: int) -> tuple[int, int]:
    return cut(numel, SHARE, unit)


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
    _rf_rmsprop(params, *state, grads, lr, *draws, *scaling, *options)


def scaled_rmsprop(
    params: list[Tensor],
    state: ScaledState,
    grads: list[Tensor],
    lr: Tensor,
    draws: Draws,
    scaling: Scaling,
    options: ScaledOptions,
) -> None:
    """Step n tensors in place: see `rootfree_kernels.eager.scaled_rmsprop`."""
    _scaled_rmsprop(params, *state, grads, lr, *draws, *scaling, *options)


clipped_momentum = clipped_momentum_with(_shares)


def kron_gather(
    grads: list[Tensor],
    tiling: Tiling,
    factors: list[Tensor],
    grad_scale: Tensor | None,
    dtype: torch.dtype,
    maximize: bool,
) -> Gathered:
    """Return G [L, p, d] and sums of squares: see `rootfree_kernels.eager.kron_gather`."""
    return Gathered(*_kron_gather(grads, *tiling, factors, grad_scale, dtype, maximize))


def kron_factor(
    factors: Factors, gathered: Gathered, draws: Draws, found_inf: Tensor | None, options: FactorOptions
) -> Tensor:
    """Update the factors in place and return ok [L]: see `rootfree_kernels.eager.kron_factor`."""
    ok: Tensor = _kron_factor(*factors, *gathered, *draws, found_inf, *options)
    return ok


def kron_step(
    weights: Weights,
    preconditioner: Preconditioner,
    gathered: Gathered,
    lr: Tensor,
    draws: Draws,
    found_inf: Tensor | None,
    options: StepOptions,
) -> None:
    """Step the weights in place: see `rootfree_kernels.eager.kron_step`."""
    factor_c, factor_k, cached, ok = preconditioner
    ranges.phase("precondition and apply")
    _kron_step(*weights, factor_c, factor_k, *gathered, lr, ok, *draws, found_inf, cached, *options)
    ranges.end_phase()


def kron_products(factor_c: Tensor, factor_k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return P_C = CCᵀ and P_K = KKᵀ: see `rootfree_kernels.eager.kron_products`."""
    product_c, product_k = _kron_products(factor_c, factor_k, dtype)
    return product_c, product_k
