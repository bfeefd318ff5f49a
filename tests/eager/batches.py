"""Batches for the operators of IF-Shampoo in eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.calls.kron import Batch, Tensors
from tests.calls.reference import KronState
from tests.calls.tensors import fp64
from tests.calls.tolerances import assert_near


def wide_batch(num_blocks: int, rows: int, cols: int, dtype: torch.dtype, **rest: Any) -> Batch:
    """Return a batch whose blocks lie one above the other in one tensor. All tensors have one dtype."""
    dtypes = dict.fromkeys(("dtype", "matmul", "grad", "param", "buffer"), dtype)
    return Batch(rows, cols, ((0, num_blocks, 0, 1),), **dtypes, **rest)


def assert_factors_are(t: Tensors, expected: Sequence[KronState], allowed: float) -> None:
    """Check C, K and their momenta. Momenta are differences that may nearly cancel, so their tolerance is larger."""
    for side, name in (("c", "C"), ("k", "K")):
        terms = [0.5 * len(getattr(state, name)) ** 0.5 for state in expected]  # the norm of I/2
        assert_near(t.factor(side), [getattr(state, name) for state in expected], allowed)
        assert_near(fp64(getattr(t, f"m_{side}")), [getattr(state, f"m_{name}") for state in expected], allowed, terms)
