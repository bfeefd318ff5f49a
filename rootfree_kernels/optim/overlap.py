"""Tensors whose elements share memory, within a tensor and between tensors. Only strides and addresses are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor


def has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor has an address: meta tensors and fake ones have none."""
    return tensor.untyped_storage().device.type != "meta"


def has_internal_overlap(tensor: Tensor) -> bool:
    """Return whether two elements of a tensor have one address, as after `expand`."""
    if not tensor.numel():
        return False
    axes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reaches = [0, *accumulate(stride * (size - 1) for stride, size in axes)]
    while axes and axes[-1][0] > reaches[len(axes) - 1]:
        axes.pop()  # the axis steps over all that the shorter strides reach, so it adds no overlap
    return bool(axes) and _num_addresses(axes) < prod(size for _, size in axes)


def _num_addresses(axes: Iterable[tuple[int, int]]) -> int:
    """Return how many addresses the elements along axes of (stride, size) have. Bit i of `used` stands for offset i."""
    used = 1
    for stride, size in axes:
        done = 1
        while done < size:
            more = min(done, size - done)
            used |= used << more * stride
            done += more
    return used.bit_count()


def overlap_ranks(tensors: Sequence[Tensor]) -> list[int]:
    """Return for each tensor how many others of the list have to be written before it, one after the other.

    It is 0 for the first tensor over a piece of memory, 1 for the next one, and so on. Tensors of one rank share no
    memory. Ranges of addresses are compared, so slices that interleave count as sharing. Tensors without memory, such
    as fake ones, share none.
    """
    ranges_on: dict[torch.device, list[tuple[int, int, int]]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if has_memory(tensor) and (start := tensor.data_ptr()) and tensor.numel():
            ranges_on[tensor.device].append((start, start + _num_bytes(tensor), index))
    ranks = [0] * len(tensors)
    for ranges in ranges_on.values():
        for cluster in _clusters(sorted(ranges)):
            _rank(cluster, ranks)
    return ranks


def _num_bytes(tensor: Tensor) -> int:
    """Return the bytes from the first element of a tensor to the end of its last one."""
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (reach + 1) * tensor.element_size()


def _clusters(ranges: Iterable[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Return the ranges (start, stop, index), sorted by their start, in runs of those that overlap. Runs of one range
    are left out."""
    clusters: list[list[tuple[int, int, int]]] = []
    end = 0
    for item in ranges:
        if item[0] >= end:
            clusters.append([])
        clusters[-1].append(item)
        end = max(end, item[1])
    return [cluster for cluster in clusters if len(cluster) > 1]


def _rank(cluster: Sequence[tuple[int, int, int]], ranks: list[int]) -> None:
    """Set the ranks of the tensors of a cluster: one more than the highest of those before it that it overlaps."""
    ordered = sorted(cluster, key=lambda item: item[2])
    for position, (start, stop, index) in enumerate(ordered):
        before = [ranks[i] for first, last, i in ordered[:position] if first < stop and start < last]
        ranks[index] = max(before, default=-1) + 1
