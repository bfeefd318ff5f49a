"""The Triton backend with P_C = CCᵀ and P_K = KKᵀ computed by `torch.bmm` (cuBLAS) instead of the symmetric kernel.

A dispatch table chooses it for batches for which it was measured to be faster (`rootfree_kernels.ops.dispatch`).
Everything else is the same. Factors, momenta and random bits agree bitwise; products agree up to the rounding of BF16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rootfree_kernels.arguments import (
    Draws,
    FactorOptions,
    Factors,
    Gathered,
    Preconditioner,
    StepOptions,
    Weights,
)
from rootfree_kernels.triton_kernels.clipped_momentum import clipped_momentum
from rootfree_kernels.triton_kernels.kron_factor import kron_factor_by
from rootfree_kernels.triton_kernels.kron_gather import kron_gather
from rootfree_kernels.triton_kernels.kron_step import kron_step_by
from rootfree_kernels.triton_kernels.products import kron_products_by, products_by_bmm
from rootfree_kernels.triton_kernels.rf_rmsprop import rf_rmsprop
from rootfree_kernels.triton_kernels.scaled_rmsprop import scaled_rmsprop
from rootfree_kernels.triton_kernels.sizes import num_partial_sums
from rootfree_kernels.triton_kernels.sizes import padded as padded_side

__all__ = [
    "clipped_momentum",
    "kron_factor",
    "kron_gather",
    "kron_products",
    "kron_step",
    "num_partial_sums",
    "padded_side",
    "rf_rmsprop",
    "scaled_rmsprop",
]


def kron_factor(
    factors: Factors, gathered: Gathered, draws: Draws, found_inf: Tensor | None, options: FactorOptions
) -> Tensor:
    """Update the factors in place and return ok [L]: see `rootfree_kernels.triton_kernels.kron_factor`."""
    return kron_factor_by(products_by_bmm, factors, gathered, draws, found_inf, options)


def kron_step(
    weights: Weights,
    preconditioner: Preconditioner,
    gathered: Gathered,
    lr: Tensor,
    draws: Draws,
    found_inf: Tensor | None,
    options: StepOptions,
) -> None:
    """Step the weights in place: see `rootfree_kernels.triton_kernels.kron_step`."""
    kron_step_by(products_by_bmm, weights, preconditioner, gathered, lr, draws, found_inf, options)


def kron_products(factor_c: Tensor, factor_k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return P_C = CCᵀ and P_K = KKᵀ: see `rootfree_kernels.eager.kron_products`."""
    return kron_products_by(products_by_bmm, factor_c, factor_k, dtype)
