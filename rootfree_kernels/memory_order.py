"""Tensors of any strides, for kernels that know only sizes: in the order in which they lie, or as copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _order(x: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the axes that say where the numbers of `x` lie."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def is_dense(x: Tensor) -> bool:
    """Whether the numbers of `x` fill a piece of memory, each once, in whatever order."""
    filled = 1
    for stride, size in sorted(_order(x)):
        if stride != filled:
            return False
        filled *= size
    return True


def alike(lists: Sequence[Sequence[Tensor]], in_any_order: bool) -> Sequence[Sequence[Tensor]]:
    """`lists` with copies in place of tensors, so that all of an index lie alike in memory.

    The order is that of the first list's tensor, if it is dense and `in_any_order`, and row by row otherwise. Lists
    may be empty. `write_back` copies what was changed to where it belongs.
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
    """Return tensors with copies in place of those that PyTorch negates only when it reads them, such as the gradient
    of the imaginary part of a conjugate: a kernel that reads their memory would see the wrong sign."""
    return [x.resolve_neg() for x in tensors] if any(map(Tensor.is_neg, tensors)) else tensors


def write_back(lists: Sequence[Sequence[Tensor]], new: Sequence[Sequence[Tensor]]) -> None:
    """Copy the tensors of `new` that are not those of `lists` to them."""
    for tensors, copies in zip(lists, new, strict=True):
        if copies is not tensors:
            for x, copy in zip(tensors, copies, strict=True):
                if x is not copy:
                    x.copy_(copy)
