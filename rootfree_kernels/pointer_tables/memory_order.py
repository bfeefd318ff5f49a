"""Tensors of any strides for kernels that know only sizes: as they are in memory, or as copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _order(x: Tensor) -> list[tuple[int, int]]:
    """Return (stride, size) of every axis longer than 1: it is the same for tensors of the same memory layout."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def is_dense(x: Tensor) -> bool:
    """Return whether the elements of `x` fill one piece of memory without gaps or overlaps, in any order of axes."""
    filled = 1
    for stride, size in sorted(_order(x)):
        if stride != filled:
            return False
        filled *= size
    return True


def match_layout(lists: Sequence[Sequence[Tensor]], in_any_order: bool) -> Sequence[Sequence[Tensor]]:
    """Copy tensors where needed, so that the i-th tensors of all lists share one memory layout. Return the lists.

    That layout is the one of the first list's tensor if it is dense and `in_any_order`, and row-major otherwise. Lists
    may be empty. After a kernel has changed copies, `write_back` copies them to the original tensors.
    """
    if all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists):
        return lists
    new: list[list[Tensor]] = [[*tensors] for tensors in lists]
    for index, first in enumerate(lists[0]):
        like = first if in_any_order and is_dense(first) else torch.empty(first.shape, device="meta")
        for tensors in new:
            if tensors and _order(tensors[index]) != _order(like):
                x = tensors[index]
                tensors[index] = torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)
    return new


def without_negation(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copy tensors that PyTorch negates lazily, such as the gradient of the imaginary part of a conjugate. A kernel
    that reads their memory would see the wrong sign. Return the list with these copies."""
    return [x.resolve_neg() for x in tensors] if any(map(Tensor.is_neg, tensors)) else tensors


def write_back(lists: Sequence[Sequence[Tensor]], new: Sequence[Sequence[Tensor]]) -> None:
    """Copy every tensor of `new` to its counterpart in `lists`, unless both are the same tensor."""
    for tensors, copies in zip(lists, new, strict=True):
        if copies is not tensors:
            for x, copy in zip(tensors, copies, strict=True):
                if x is not copy:
                    x.copy_(copy)
