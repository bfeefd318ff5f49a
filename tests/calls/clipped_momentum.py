"""Inputs for `clipped_momentum` on any device, and checks of its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.calls import reference as ref
from tests.calls.tensors import FILL, FP32, MARGIN, assert_memory_around_is_untouched, drawn, fp64
from tests.calls.tolerances import tolerance

Sides = list[Tensor]


def sides(
    num_blocks: int,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = FP32,
    scale: float = 1.0,
    offsets: tuple[int, int] = (0, 0),
    device: Any = "cpu",
) -> tuple[Sides, Sides]:
    """Return momenta and deltas with blocks of these shapes.

    `offsets` shift the start of momenta and of deltas, in elements, from an address that is a multiple of 16 bytes.
    """
    generator = torch.Generator().manual_seed(0)

    def placed(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
        x = drawn(shape, generator) * scale
        start = MARGIN + offset
        memory = torch.full((start + x.numel() + MARGIN,), FILL, dtype=dtype, device=device)
        return memory[start : start + x.numel()].view(shape).copy_(x)

    full = [(num_blocks, *shape) for shape in shapes]
    return [placed(shape, dtype, offsets[0]) for shape in full], [placed(shape, FP32, offsets[1]) for shape in full]


def assert_memory_around_sides_is_untouched(*lists: Sides) -> None:
    """Check that the memory around tensors from `sides` did not change."""
    for x in (x for tensors in lists for x in tensors):
        size = x.storage_offset() + x.numel() + MARGIN
        assert_memory_around_is_untouched([(x, x.as_strided((size,), (1,), 0))])


def clips_of(value: np.ndarray, clip: str) -> list[float]:
    """Return the clip factors of blocks [L, …] from the reference."""
    blocks = value if value.ndim == 3 else value.reshape(len(value), 1, -1)
    return [float(ref.clipped_beta2(block, 1.0, None if clip == "none" else clip)) for block in blocks]


def assert_matches_reference(momenta: Sides, deltas: Sides, old: Sides, clips: Tensor, alpha: float, clip: str) -> None:
    """Check momenta [L, …] and clip factors [sides, L] against the reference. `old` are the momenta before the call."""
    for m, delta, before, factors in zip(momenta, deltas, old, clips, strict=True):
        value = alpha * fp64(before) + (1 - alpha) * fp64(delta)
        wide = torch.promote_types(m.dtype, FP32)
        cancelled = tolerance("an element", wide) * np.abs(value).max()
        np.testing.assert_allclose(fp64(m), value, rtol=tolerance("an element", m.dtype), atol=cancelled)
        np.testing.assert_allclose(fp64(factors), clips_of(value, clip), rtol=tolerance("one step", wide))
