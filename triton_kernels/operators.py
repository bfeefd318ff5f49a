"""The operators of the Triton backend, under the names of `rootfree_kernels.backend.Operators`. Imports Triton."""

from rootfree_kernels.triton_kernels.clipped_momentum import clipped_momentum
from rootfree_kernels.triton_kernels.kron_factor import kron_factor
from rootfree_kernels.triton_kernels.kron_gather import kron_gather
from rootfree_kernels.triton_kernels.kron_step import kron_step
from rootfree_kernels.triton_kernels.products import kron_products
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
