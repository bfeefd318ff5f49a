"""Fill new memory with NaN, so that tests detect reads of unwritten elements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

FULL = {
    **dict.fromkeys([torch.float64, torch.float32, torch.bfloat16, torch.float16], torch.nan),
    **{torch.int64: 1 << 60, torch.int32: 1 << 30, torch.int16: 1 << 14, torch.int8: 1 << 6, torch.uint8: 1 << 7},
    torch.bool: True,
}
MAKERS = (
    *((torch, name) for name in ("empty", "empty_like", "empty_strided")),
    *((Tensor, name) for name in ("new_empty", "new_empty_strided")),
)
LARGE = 1 << 30
"""Tensors with at least this many elements are not filled: tests use only a few pages of them."""


def filled(made: Tensor) -> Tensor:
    """Fill a new tensor with NaN, or with a large number."""
    return made.fill_(FULL[made.dtype]) if made.device.type != "meta" and made.numel() < LARGE else made


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """Fill new uninitialized tensors with NaN inside a `with` block.

    In Python, `torch.empty` and similar functions are replaced. In C++, PyTorch fills new memory itself if
    deterministic algorithms are enabled. They are enabled only without a GPU, where they do not affect the tests in any
    other way.
    """
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in MAKERS:
            make = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, make=make, **options: filled(make(*args, **options)))
        with nan_from_cpp():
            yield


@contextmanager
def nan_from_cpp() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
