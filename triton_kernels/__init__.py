"""The Triton room: the operators of :mod:`rootfree_kernels.eager` as fused kernels, under the same stems.

Each file reads from the formula to the kernel, its configurations and the launcher. `common` and `products` hold what
kernels share, `launch` what launchers share.

This folder is installed as ``rootfree_kernels.triton_kernels`` and always imported by that name. A top-level
``triton_kernels`` belongs to another project, and inference engines probe for it: a bare
``import triton_kernels`` works in the root of this repository by accident only, and makes a second copy of
every kernel.
"""

from rootfree_kernels.triton_kernels.clipped_momentum import clipped_momentum
from rootfree_kernels.triton_kernels.kron_factor import kron_factor
from rootfree_kernels.triton_kernels.kron_gather import kron_gather, num_partial_sums
from rootfree_kernels.triton_kernels.kron_gather import padded as padded_side
from rootfree_kernels.triton_kernels.kron_step import kron_step
from rootfree_kernels.triton_kernels.products import kron_products
from rootfree_kernels.triton_kernels.rf_rmsprop import rf_rmsprop

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
