"""Eager PyTorch for matrices that no kernel serves, with the momentum of the factors stepped by the CUDA kernel.

It serves FP32 factors on a GPU without Triton, for example.
"""

from __future__ import annotations

from functools import partial

from rootfree_kernels.eager import kron_gather, kron_products, kron_step, num_partial_sums, padded_side, rf_rmsprop
from rootfree_kernels.eager.kron_factor import kron_factor_by
from rootfree_kernels.native.cuda import clipped_momentum

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

kron_factor = partial(kron_factor_by, clipped_momentum)
