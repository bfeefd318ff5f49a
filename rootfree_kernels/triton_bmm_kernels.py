"""The Triton room with P_C = CCᵀ and P_K = KKᵀ by `torch.bmm`, which is cuBLAS, instead of the symmetric kernel.

A dispatch table chooses it for batches where it was measured to be faster (`rootfree_kernels.dispatch`). All else is
the same: factors, momenta and random bits are to the bit, products but for the roundings of BF16.
"""

from __future__ import annotations

from functools import partial

from rootfree_kernels.triton_kernels import clipped_momentum, kron_gather, num_partial_sums, padded_side, rf_rmsprop
from rootfree_kernels.triton_kernels.kron_factor import kron_factor_by
from rootfree_kernels.triton_kernels.kron_step import kron_step_by
from rootfree_kernels.triton_kernels.products import kron_products_by, products_by_bmm

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

kron_factor = partial(kron_factor_by, products_by_bmm)
kron_step = partial(kron_step_by, products_by_bmm)
kron_products = partial(kron_products_by, products_by_bmm)
