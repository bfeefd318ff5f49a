"""Eager PyTorch for matrices that no kernel serves, with the momentum of the factors updated by the Triton kernels.

It serves FP32 factors on a GPU, for example. The matrix kernels of Triton serve BF16 only.
"""

from __future__ import annotations

from torch import Tensor

from rootfree_kernels.arguments import Draws, FactorOptions, Factors, Gathered
from rootfree_kernels.eager import (
    kron_gather,
    kron_products,
    kron_step,
    num_partial_sums,
    padded_side,
    rf_rmsprop,
    scaled_rmsprop,
)
from rootfree_kernels.eager.kron_factor import kron_factor_by
from rootfree_kernels.triton_kernels.clipped_momentum import clipped_momentum

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
    """Update the factors in place and return ok [L]: see `rootfree_kernels.eager.kron_factor`."""
    return kron_factor_by(clipped_momentum, factors, gathered, draws, found_inf, options)
