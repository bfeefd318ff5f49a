"""Tolerances for comparison with the FP64 reference, and checks that use them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCES = {
    # An elementwise step, or results of a matrix step that are stored in this dtype.
    (torch.float64, "one step"): 1e-12,  # a few thousand roundings of 1e-16
    (torch.float32, "one step"): 1e-5,  # a few hundred roundings of 6e-8
    (torch.float16, "one step"): 1e-3,  # one rounding of 5e-4 of the stored result
    (torch.bfloat16, "one step"): 8e-3,  # one rounding of 4e-3 of the stored result; stochastic rounding doubles it
    # A matrix step whose products have this dtype.
    (torch.float64, "one step of products"): 1e-12,
    (torch.float32, "one step of products"): 1e-5,
    (torch.bfloat16, "one step of products"): 3e-2,  # a handful of roundings of 4e-3 of operands and results
    # Several steps, or products of products: errors add up, or are amplified.
    (torch.float64, "a chain"): 1e-12,  # as in one step: products of well-conditioned matrices lose few digits
    (torch.float32, "a chain"): 3e-5,  # a few thousand roundings of 6e-8
    (torch.float16, "a chain"): 1e-3,  # three steps with one rounding of 5e-4 each, which do not all add up
    (torch.bfloat16, "a chain"): 3e-2,  # a handful of roundings of 4e-3
    (torch.bfloat16, "a long chain"): 5e-2,  # 50 steps with roundings of 4e-3, most of which cancel
    # The largest relative error of an element.
    (torch.float64, "an element"): 1e-13,  # a few hundred roundings of 1e-16
    (torch.float32, "an element"): 1e-6,  # a few roundings of 6e-8; also for a sum of squares, whose errors cancel
    (torch.bfloat16, "an element"): 2.0**-8,  # one rounding to nearest
}
"""Relative Frobenius errors by dtype and kind of computation. "an element" is relative to the element."""


def tolerance(kind: str, *dtypes: torch.dtype) -> float:
    """Return the tolerance of the coarsest of these dtypes."""
    return max(TOLERANCES[dtype, kind] for dtype in dtypes)


def one_step(*stored: torch.dtype, products: torch.dtype | None = None) -> float:
    """Return the tolerance of a step with results of these dtypes and products of the dtype `products`."""
    kinds = [*((dtype, "one step") for dtype in stored), *([(products, "one step of products")] if products else [])]
    return max(TOLERANCES[kind] for kind in kinds)


def relative_error(actual: Tensor, expected: np.ndarray) -> float:
    """Return ‖actual − expected‖ / ‖expected‖ in FP64."""
    difference = actual.detach().double().cpu().numpy() - expected
    return float(np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-300))


def assert_close(actual: Tensor, expected: Any, dtype: torch.dtype, kind: str = "one step") -> None:
    """Check that `actual` is within the tolerance of the reference."""
    error, allowed = relative_error(actual, np.asarray(expected)), tolerance(kind, dtype)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.0e}"


def assert_near(
    actual: Iterable[Any], expected: Iterable[np.ndarray], allowed: float, terms: Iterable[float] = ()
) -> None:
    """Check that each block is within a relative error of the reference.

    Errors are relative to the norm of the block plus its element of `terms`. A term is needed for a block that is a
    difference, since its norm may be close to 0. It is the norm of the operands.
    """
    pairs = zip(actual, expected, strict=True)
    for index, ((x, y), term) in enumerate(zip(pairs, terms or repeat(0.0), strict=False)):
        norm = np.linalg.norm(y)
        error = relative_error(torch.as_tensor(x), y) * norm / max(norm + term, 1e-300)
        assert error <= allowed, f"block {index}: relative error {error:.1e}, allowed {allowed:.0e}"
