"""Helpers of the eager operators: wide values, stored values and their rounding, and the heavy-ball step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rootfree_kernels import rounding as rnd

WIDE = (torch.float32, torch.float64)

CACHE_ELEMENTS = 1 << 18
"""Elements of G that a CPU works on at a time: half a dozen FP32 tensors of this size (6 MiB) stay near a core."""


class Stored(NamedTuple):
    """A tensor as the optimizer keeps it, and what is needed to round a new value into its place."""

    value: Tensor
    residual: Tensor | None  # int16, the lower half of a compensated pair
    rounding: str
    draw_bits: Callable[[], Tensor]  # called only if stochastic rounding needs random bits

    def load(self) -> Tensor:
        """Return the wide value."""
        if self.residual is None:
            return self.value if self.value.dtype == torch.float64 else self.value.float()
        return rnd.join_compensated(self.value, self.residual)

    def rounded(self, new: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return wide `new` as the (value, residual) to store. Dtypes other than BF16 are rounded to nearest."""
        if self.residual is not None:
            return rnd.split_compensated(new.float())
        if self.value.dtype == torch.bfloat16 and self.rounding == "stochastic":
            return rnd.round_stochastic(new.float(), self.draw_bits().view(new.shape)), None
        return new.to(self.value.dtype), None


def heavy_ball_(
    weights: list[Tensor],
    buffers: list[Tensor],
    directions: list[Tensor],
    keep: Tensor,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """Step weights along preconditioned directions u with heavy-ball momentum, in place.

        m ← α₁m + u + κμ,    μ ← μ − β₁m                      (Fig. 6; L2 decay, the default)
        m ← α₁m + u,         μ ← (1 − β₁κ)μ − β₁m             (decoupled, as in AdamW)

    All tensors are wide and finite; `lr` is 0-d. `keep` [number of tensors, …] is 1 where a step is taken and 0
    elsewhere, and is broadcast over a tensor. It multiplies, which is as exact as `torch.where`; `torch.where` is slow
    on a CPU if its condition is broadcast. The directions are overwritten.
    """
    keeps, rates = list(keep.unbind()), list((keep * lr).unbind())
    torch._foreach_add_(directions, buffers, alpha=momentum)
    if weight_decay and not decoupled:
        torch._foreach_add_(directions, weights, alpha=weight_decay)
    torch._foreach_lerp_(buffers, directions, keeps)
    if weight_decay and decoupled:
        torch._foreach_addcmul_(weights, weights, rates, value=-weight_decay)
    torch._foreach_addcmul_(weights, directions, rates, value=-1)


def descend_(weights: list[Tensor], directions: list[Tensor], rates: Tensor, weight_decay: float) -> None:
    """Step weights along u without momentum, μ ← (1 − β₁κ)μ − β₁u, in place.

    All tensors are wide and finite. `rates` [number of tensors, …] is β₁, or 0 where no step is taken.
    """
    each = list(rates.unbind())
    if weight_decay:
        torch._foreach_addcmul_(weights, weights, each, value=-weight_decay)
    torch._foreach_addcmul_(weights, directions, each, value=-1)


def cache_slices(num_blocks: int, rows: int, cols: int, device: torch.device) -> list[slice]:
    """Return slices of L blocks of p × d that are worked through one after the other.

    On a CPU a slice holds as many blocks as its cache can, with everything computed from them. Other devices take all
    blocks at once.
    """
    step = max(1, CACHE_ELEMENTS // (rows * cols)) if device.type == "cpu" else num_blocks
    return [slice(start, start + step) for start in range(0, num_blocks, step)]


T = TypeVar("T", bound=tuple[Any, ...])


def some_blocks(fields: T, part: slice) -> T:
    """Return a named tuple with the fields of some blocks or tensors: tensors and lists are sliced, the rest stays."""
    return type(fields)(*[x[part] if isinstance(x, Tensor | list) else x for x in fields])
