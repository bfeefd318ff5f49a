"""The formulas in PyTorch: the fallback of every backend, and the ground truth of their tests.

One file for each operator: `rf_rmsprop`, `scaled_rmsprop`, `clipped_momentum`, `kron_gather`, `kron_factor`,
`kron_step`. `common`, `curvature` and `products` hold what they share.
"""

from __future__ import annotations

from functools import cache

import torch

from rootfree_kernels.backend import Backend, FactorDtypes
from rootfree_kernels.eager.clipped_momentum import clipped_momentum
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


@cache
def _cpu_multiplies_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def cpu_matmul_dtype(factor_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which PyTorch's libraries multiply factors fastest.

    A CPU multiplies BF16 factors in BF16 if it has instructions for that, and in FP32 otherwise. With AVX512_BF16 a
    BF16 product took a quarter of the time of an FP32 one, and 1.3 times as long with these instructions switched off
    (`python -m bench.cpu_step`, and again under ONEDNN_MAX_CPU_ISA=AVX512_CORE).
    """
    if device.type == "cpu" and factor_dtype == torch.bfloat16 and not _cpu_multiplies_bf16():
        return torch.float32
    return factor_dtype


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
