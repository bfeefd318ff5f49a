"""The Triton backend with P_C = CCᵀ and P_K = KKᵀ by `torch.bmm`, which is cuBLAS, instead of the symmetric kernel.

A dispatch table chooses it for batches for which it was measured to be faster (`rootfree_kernels.ops.dispatch`).
Everything else is the same: factors, momenta and random bits agree bitwise, products up to the roundings of BF16.
"""

from __future__ import annotations

from functools import partial

from rootfree_kernels.triton_kernels.clipped_momentum import clipped_momentum
from rootfree_kernels.triton_kernels.kron_factor import kron_factor_by
from rootfree_kernels.triton_kernels.kron_gather import kron_gather
from rootfree_kernels.triton_kernels.kron_step import kron_step_by
from rootfree_kernels.triton_kernels.products import kron_products_by, products_by_bmm
from rootfree_kernels.triton_kernels.rf_rmsprop import rf_rmsprop
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
]

kron_factor = partial(kron_factor_by, products_by_bmm)
kron_step = partial(kron_step_by, products_by_bmm)
kron_products = partial(kron_products_by, products_by_bmm)
