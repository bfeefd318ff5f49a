"""The formulas in PyTorch: the fallback of every backend, and the ground truth of their tests.

One file for each operator: `rf_rmsprop`, `scaled_rmsprop`, `clipped_momentum`, `kron_gather`, `kron_factor`,
`kron_step`. `common`, `curvature` and `products` hold what they share.
"""

from __future__ import annotations

import torch

from rootfree_kernels.backend import Backend, FactorDtypes
from rootfree_kernels.eager.clipped_momentum import clipped_momentum
from rootfree_kernels.eager.cpu_products import cpu_matmul_dtype
from rootfree_kernels.eager.kron_factor import kron_factor
from rootfree_kernels.eager.kron_gather import kron_gather, num_partial_sums, padded_side
from rootfree_kernels.eager.kron_step import kron_step
from rootfree_kernels.eager.products import kron_products
from rootfree_kernels.eager.rf_rmsprop import rf_rmsprop
from rootfree_kernels.eager.scaled_rmsprop import scaled_rmsprop

__all__ = [
    "EAGER",
    "clipped_momentum",
    "cpu_matmul_dtype",
    "kron_factor",
    "kron_gather",
    "kron_products",
    "kron_step",
    "num_partial_sums",
    "padded_side",
    "rf_rmsprop",
    "scaled_rmsprop",
]


def _why_not(device: torch.device, dtype: torch.dtype, factors: FactorDtypes | None) -> str | None:
    return None


EAGER = Backend(
    name="eager",
    module="rootfree_kernels.eager",
    devices=None,
    why_not=_why_not,
    is_fused=False,
    matmul_dtype=cpu_matmul_dtype,
)
