"""The C++ room: the operators of `rootfree_kernels.eager` on a CPU (csrc/cpu).

A pass over memory each for the diagonal step, the gather, the epilogues of an update and the step of the weights, by
the widest instructions of the processor; matrix products are those of PyTorch's libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

import rootfree_kernels._C  # noqa: F401  registers the operators
from rootfree_kernels import eager, ranges
from rootfree_kernels.momentum import cut
from rootfree_kernels.native import clipped_momentum_with

SHARE = 1 << 14
"""Numbers of a block of the clipped momentum that are summed up at a time."""

SHARE_ROWS = 64
"""Rows of a block whose squares `kron_gather` sums up at a time (`share_rows` of csrc/cpu/kron_gather.cpp)."""


def padded_side(size: int) -> int:
    """The side of G that is made of a block's: the same."""
    return size


def num_partial_sums(rows: int, cols: int) -> int:
    """Numbers a block that `kron_gather` hands on beside G: sums of squares of some rows each."""
    return -(-max(rows, cols) // SHARE_ROWS)


def _shares(numel: int, unit: int) -> tuple[int, int]:
    return cut(numel, SHARE, unit)


def _like(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator of the extension with the signature of an eager function."""
    operator = getattr(torch.ops.rootfree_native, function.__name__).default

    @wraps(function)
    def call(*args: Any) -> Any:
        return operator(*args)

    return call


rf_rmsprop = _like(eager.rf_rmsprop)
clipped_momentum = clipped_momentum_with(_shares)
kron_gather = _like(eager.kron_gather)
kron_factor = _like(eager.kron_factor)
kron_products = _like(eager.kron_products)
_kron_step = _like(eager.kron_step)


@wraps(eager.kron_step)
def kron_step(*args: Any) -> None:
    ranges.phase("precondition and apply")
    _kron_step(*args)
    ranges.end_phase()
