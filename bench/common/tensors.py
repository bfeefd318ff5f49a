"""Random tensors that are the same in every run, and a GPT-2's parameters made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from math import prod

import torch
from torch import Tensor

from bench.common.gpt import GPT2, Shape


def random_tensors(
    shapes: Iterable[Shape], device: torch.device, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """Return normally distributed numbers times `scale`, without touching a global generator."""
    generator = torch.Generator(device=device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    return [torch.randn(shape, **options).mul_(scale).to(dtype) for shape in shapes]


class Model:
    """GPT-2's parameters in FP32, with gradients that can be moved."""

    SPACING = 64  # numbers; 256 bytes, as far apart as the allocator puts tensors

    def __init__(self, gpt2: GPT2, device: torch.device) -> None:
        shapes = [*gpt2.shapes().values()]
        self.params = [torch.nn.Parameter(x) for x in random_tensors(shapes, device, scale=0.02)]
        self.room = 1024  # moves until an address comes again
        ends = [(prod(shape) // self.SPACING + 1) * self.SPACING for shape in shapes]
        self.starts = [sum(ends[:index]) for index in range(len(ends))]
        (self.pool,) = random_tensors([(sum(ends) + self.room * self.SPACING,)], device, scale=0.1, seed=1)
        self.moves: Iterator[int] = count()
        self.move_gradients()

    def move_gradients(self) -> None:
        """Give every parameter a gradient at another address than in the steps before."""
        offset = next(self.moves) % self.room * self.SPACING
        for param, start in zip(self.params, self.starts, strict=True):
            param.grad = self.pool[offset + start : offset + start + param.numel()].view(param.shape)

    def new_gradients(self, seed: int) -> list[Tensor]:
        return random_tensors([tuple(x.shape) for x in self.params], self.pool.device, scale=0.1, seed=seed)
