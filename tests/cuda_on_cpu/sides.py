"""Calls of the normalised momentum: the sides of a batch, on any device, and what must come of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import reference as ref
import torch
from cuda_on_cpu.calls import BF16, FILL, FP32
from torch import Tensor

TOLERANCE = {FP32: 1e-6, BF16: 2.0**-8}  # of every number: two roundings of 6e-8, and one of half a unit


def sides(
    num_blocks: int,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = FP32,
    scale: float = 1.0,
    offsets: tuple[int, int] = (0, 0),
    device: str = "cpu",
) -> tuple[list[Tensor], list[Tensor]]:
    """(momenta, deltas) with blocks of these shapes, which begin so many numbers behind an address of 16 bytes."""
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
        x = torch.randn(shape, generator=generator) * scale
        memory = torch.full((x.numel() + 24,), FILL, dtype=dtype, device=device)
        return memory[8 + offset : 8 + offset + x.numel()].view(shape).copy_(x)

    full = [(num_blocks, *shape) for shape in shapes]
    return [drawn(shape, dtype, offsets[0]) for shape in full], [drawn(shape, FP32, offsets[1]) for shape in full]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def fp64(x: Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def assert_is_the_reference_s(
    momenta: list[Tensor], deltas: list[Tensor], old: list[Tensor], clips: Tensor, alpha: float, clip: str
) -> None:
    """The momenta [L, …] made from `old`, and the clips [sides, L], are the reference's."""
    for m, delta, before, factors in zip(momenta, deltas, old, clips, strict=True):
        value = alpha * fp64(before) + (1 - alpha) * fp64(delta)
        largest = np.abs(value).max()
        np.testing.assert_allclose(fp64(m), value, rtol=TOLERANCE[m.dtype], atol=1e-6 * largest)
        blocks = value if value.ndim == 3 else value.reshape(len(value), 1, -1)
        wanted = [ref.clipped_beta2(block, 1.0, None if clip == "none" else clip) for block in blocks]
        np.testing.assert_allclose(fp64(factors), wanted, rtol=1e-5)
