"""The formulas in PyTorch: the fallback of every backend and the ground truth of its tests."""

from rootfree_kernels.eager.clipped_momentum import clipped_momentum
from rootfree_kernels.eager.kron_factor import (
    kron_factor,
    kron_gather,
    kron_products,
    kron_step,
    num_partial_sums,
    padded_side,
)
from rootfree_kernels.eager.rf_rmsprop import rf_rmsprop

__all__ = [
    "clipped_momentum",
    "kron_factor",
    "kron_gather",
    "kron_products",
    "kron_step",
    "num_partial_sums",
    "padded_side",
    "rf_rmsprop",
]
