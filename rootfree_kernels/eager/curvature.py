"""The mean curvature q of a block: a scale for its damping, and for the start of its factors.

    q ← 0.95·q + 0.05·B·mean(G²),    and q = B·mean(G²) when the first gradient comes that is not 0

q = 0 means that no such gradient has come yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CURVATURE_STEP = 0.05
"""The weight of the newest mean square in q."""


class Curvature(NamedTuple):
    """q of L blocks before it is stored, and what follows from it."""

    new: Tensor  # q, wide
    starts: Tensor  # bool: where the first gradient has come that is not 0
    idle: Tensor  # bool: where the gradient is 0, so that it tells nothing about the curvature


def follow(old: Tensor, mean_square: Tensor, found_inf: Tensor | None) -> Curvature:
    """Return the curvature after a gradient with B·mean(G²) = `mean_square`, of the shape and dtype of `old`.

    Nothing starts if the mean square is not finite, or if `found_inf` is not 0.
    """
    starts = (old == 0) & (mean_square > 0) & (mean_square < torch.inf)
    if found_inf is not None:
        starts = starts & (found_inf.reshape(()) == 0)
    idle = mean_square == 0
    new = torch.where(starts, mean_square, torch.where(idle, old, old.lerp(mean_square, CURVATURE_STEP)))
    return Curvature(new, starts, idle)
