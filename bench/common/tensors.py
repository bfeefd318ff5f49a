"""Random tensors that are the same in every run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Shape = tuple[int, ...]


def random_tensors(
    shapes: Iterable[Shape], device: torch.device, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """Return normally distributed numbers times `scale`, without touching a global generator."""
    generator = torch.Generator(device=device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    return [torch.randn(shape, **options).mul_(scale).to(dtype) for shape in shapes]
