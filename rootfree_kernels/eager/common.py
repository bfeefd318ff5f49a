"""What the eager operators share: widening, stored values and their rounding, the heavy-ball step of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rootfree_kernels import rounding as rnd

WIDE = (torch.float32, torch.float64)


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype of element-wise arithmetic: FP32, or FP64 where `x` is FP64."""
    return x if x.dtype == torch.float64 else x.float()


def as_scalar(x: Tensor) -> Tensor:
    """A one-element tensor as 0-d, without reading it."""
    return x.reshape(())


class Stored(NamedTuple):
    """A tensor as the optimizer keeps it, with all that is needed to write a new value in its place."""

    value: Tensor
    residual: Tensor | None  # int16, the lower half of a compensated pair
    rounding: str
    draw_bits: Callable[[], Tensor]  # called only where stochastic rounding needs them

    def load(self) -> Tensor:
        """The wide value."""
        if self.residual is None:
            return wide(self.value)
        return rnd.join_compensated(self.value, self.residual)

    def rounded(self, new: Tensor) -> tuple[Tensor, Tensor | None]:
        """Wide `new` as (value, residual) to store. Only BF16 knows rounding modes; other dtypes round to nearest."""
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
    """The heavy-ball step along preconditioned directions u, in place; all are wide and finite, `lr` is 0-d.

        m ← α₁m + u + κμ,    μ ← μ − β₁m                      (Fig. 6; L2 decay, the default)
        m ← α₁m + u,         μ ← (1 − β₁κ)μ − β₁m             (decoupled, as in AdamW)

    `keep` [number of tensors, …] is 1 where a step is taken and 0 where it is not, and is broadcast over a tensor. It
    multiplies, which is as exact as `torch.where`, whose broadcast condition is slow on a CPU. The directions are
    overwritten.
    """
    keeps, rates = list(keep.unbind()), list((keep * lr).unbind())
    torch._foreach_add_(directions, buffers, alpha=momentum)
    if weight_decay and not decoupled:
        torch._foreach_add_(directions, weights, alpha=weight_decay)
    torch._foreach_lerp_(buffers, directions, keeps)
    if weight_decay and decoupled:
        torch._foreach_addcmul_(weights, weights, rates, value=-weight_decay)
    torch._foreach_addcmul_(weights, directions, rates, value=-1)
