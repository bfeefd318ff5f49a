"""Tensors for calls of operators: dtypes, memory layouts and bitwise comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ROUNDINGS = ("nearest", "stochastic", "compensated")
CLIPS = ("frobenius", "row_sum", "none")

FILL = 77
"""Value of the memory around a tensor. It is exact in int16 and in every floating dtype used here."""

MARGIN = 8
"""Number of elements before a tensor without an offset. They take a multiple of 16 bytes in every dtype."""

OFFSETS = {"offset by 1": 1, "offset by 3": 3, "offset by 8": 8}


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw uniform FP32 values in (-2, 2).

    They are computed from random integers, so they are equal under every instruction set. Normal values are not.
    """
    return torch.randint(-(2**20) + 1, 2**20, shape, generator=generator).float() / 2**19


def drawn_residual(shape: tuple[int, ...], generator: torch.Generator, limit: int = 2**15) -> Tensor:
    """Draw the int16 residuals of compensated BF16 values."""
    return torch.randint(-limit, limit, shape, dtype=torch.int16, generator=generator)


def strides_of(shape: tuple[int, ...], layout: str) -> list[int]:
    """Return the strides of a tensor in a layout. Only tensors with four axes can be "channels last"."""
    order = list(range(len(shape)))
    if layout == "transposed":
        order.reverse()
    elif layout == "channels last" and len(shape) == 4:
        order = [0, 2, 3, 1]
    strides, stride = [0] * len(shape), 2 if layout == "every other" else 1
    for axis in reversed(order):
        strides[axis] = stride
        stride *= max(1, shape[axis])
        if layout == "wide rows" and axis == len(shape) - 1:
            stride += 8 + -stride % 8  # leave a gap of at least 8 elements between rows
    return strides


def laid_out(value: Tensor, layout: str, device: torch.device | str = "cpu", shift: int = 0) -> tuple[Tensor, Tensor]:
    """Copy `value` to a layout in memory filled with `FILL`; return the copy and the memory around it.

    The copy starts `shift` elements after the offset of the layout.
    """
    shape, strides = tuple(value.shape), strides_of(tuple(value.shape), layout)
    reach = sum(max(0, size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    offset = MARGIN + OFFSETS.get(layout, 0) + shift
    memory = torch.full((offset + reach + MARGIN,), FILL, dtype=value.dtype)
    memory.as_strided(shape, strides, offset).copy_(value)
    memory = memory.to(device)  # copy all memory at once: the fake GPU has no kernel for strided copies
    return memory.as_strided(shape, strides, offset), memory


def sliced(x: Tensor) -> Tensor:
    """Return a copy of `x` as a view of a larger tensor, with an offset and with gaps along every axis."""
    whole = torch.zeros([2 * size + 3 for size in x.shape], dtype=x.dtype)
    view = whole[tuple(slice(1, 1 + 2 * size, 2) for size in x.shape)]
    return view.copy_(x)


def permuted(x: Tensor) -> Tensor:
    """Return a copy of `x` with reversed order of axes in memory."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def outside(x: Tensor, memory: Tensor) -> Tensor:
    """Return a mask of the elements of `memory` that are not elements of `x`."""
    mask = torch.ones(memory.shape, dtype=torch.bool, device=memory.device)
    mask.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    return mask


def assert_memory_around_is_untouched(places: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Check that the memory around tensors still equals `FILL`. `places` are pairs from `laid_out`."""
    for x, memory in places:
        assert (memory[outside(x, memory)] == FILL).all()


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def fp64(x: Tensor) -> np.ndarray:
    """Return the values in FP64 on the host."""
    return x.detach().double().cpu().numpy()


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors have equal dtypes, shapes and bits, including signs of zero and NaNs."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    patterns = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (actual, expected)]
    return torch.equal(*patterns)


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that two snapshots are bitwise equal."""
    assert sorted(actual) == sorted(expected)
    differ = [name for name in actual if not same_bits(actual[name], expected[name])]
    assert not differ, f"these differ: {differ}"
