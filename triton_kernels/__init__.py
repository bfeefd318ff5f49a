"""The Triton backend: the operators of `rootfree_kernels.eager` as fused kernels, in files of the same names.

Each file holds the formula, the kernels, their configurations and the launcher, in this order. `common` and `products`
hold helpers of kernels, `launch` those of launchers, and `sizes` the sizes that both agree on. This file describes the
backend without importing Triton; `operators` imports it.

This folder is installed as `rootfree_kernels.triton_kernels`. Always import it by that name: a top-level
`triton_kernels` is another project, and inference engines probe for it. A bare `import triton_kernels` in the root of
this repository works only by accident, and creates a second copy of every kernel.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from rootfree_kernels.backend import FP64_PROBLEM, Backend, FactorDtypes, momentum_problem, old_gpu_problem
from rootfree_kernels.triton_kernels.workspace import workspace

if TYPE_CHECKING:
    from rootfree_kernels.backend import Operators
    from rootfree_kernels.triton_kernels import operators, with_bmm, with_eager_matrices

    # mypy verifies that these modules define every operator, with its signature.
    _MODULES: tuple[Operators, ...] = (operators, with_bmm, with_eager_matrices)

__all__ = ["EAGER_WITH_TRITON_MOMENTUM", "TRITON", "TRITON_WITH_BMM"]


def _why_not(device: torch.device, dtype: torch.dtype, factors: FactorDtypes | None) -> str | None:
    """Return why the kernels cannot serve, or None: see `Backend.why_not`."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "it does not run on cpu devices, except under TRITON_INTERPRET=1 to test kernels"
    if device.type not in ("cuda", "cpu"):
        return f"it does not run on {device.type} devices"
    if device.type == "cuda" and interpreted:
        return "TRITON_INTERPRET=1 is set, and the interpreter runs kernels on the CPU"
    if dtype == torch.float64:
        return FP64_PROBLEM
    if factors is not None and (factors[0] != torch.bfloat16 or factors[1] not in (None, torch.bfloat16)):
        return f"its matrix products are of BF16, not of {factors[1] or factors[0]}"
    return TRITON.import_problem or old_gpu_problem(device)


def _why_not_momentum(device: torch.device, dtype: torch.dtype, factors: FactorDtypes | None) -> str | None:
    """Return why the momentum kernels cannot serve, or None: see `Backend.why_not`."""
    return momentum_problem(factors) or _why_not(device, torch.float32, None)


TRITON_WITH_BMM = Backend(
    name="triton_bmm",
    module="rootfree_kernels.triton_kernels.with_bmm",
    devices=(),
    why_not=_why_not,
    makes_products=True,
    fuses_last_product=True,
    workspace=workspace,
)

TRITON = Backend(
    name="triton",
    module="rootfree_kernels.triton_kernels.operators",
    devices=("cuda",),
    why_not=_why_not,
    makes_products=True,
    fuses_last_product=True,
    workspace=workspace,
    variants={"bmm": TRITON_WITH_BMM},
)

EAGER_WITH_TRITON_MOMENTUM = Backend(
    name="eager_with_triton_momentum",
    module="rootfree_kernels.triton_kernels.with_eager_matrices",
    devices=("cuda",),
    why_not=_why_not_momentum,
    is_selectable=False,
    is_fused=False,
)
