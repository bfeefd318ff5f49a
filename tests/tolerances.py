"""How far a result may be from the FP64 reference, as a relative Frobenius error, and why."""

from __future__ import annotations

import numpy as np
import torch

RELATIVE_ERROR = {
    torch.float64: 1e-12,  # a few thousand roundings of 1e-16
    torch.float32: 3e-5,  # a few thousand roundings of 6e-8, amplified by chains of products
    torch.bfloat16: 3e-2,  # a handful of roundings of 4e-3, of the operands and of what is stored
}


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """‖actual − expected‖ / ‖expected‖ in FP64."""
    difference = actual.detach().double().numpy() - expected
    return float(np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-300))


def assert_close(actual: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    """`actual` lies within the tolerance of `dtype` of the reference."""
    error = relative_error(actual, np.asarray(expected))
    assert error <= RELATIVE_ERROR[dtype], f"relative error {error:.2e}, allowed {RELATIVE_ERROR[dtype]:.0e}"
