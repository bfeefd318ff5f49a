"""The norm-clipped momentum of the factors: m ← α₂m + (1−α₂)Δ, and the factor 1/max(1, ‖m‖) that clips their step."""

from __future__ import annotations

import torch
from torch import Tensor


def block_norm(m: Tensor, clip: str) -> Tensor:
    """Return ‖m‖ [L] of blocks m [L, ...].

    `clip` names the norm. "frobenius" takes it over all axes but the first. "row_sum" takes the largest absolute row
    sum of symmetric blocks [L, n, n], which is never below the largest singular value. "none" returns 0, so that
    nothing is clipped, but NaN if m is not finite.
    """
    if clip == "row_sum":
        return torch.linalg.vector_norm(m, 1, dim=-1).amax(-1)
    norm = torch.linalg.vector_norm(m, dim=tuple(range(1, m.dim())))
    return norm if clip == "frobenius" else norm * 0.0


def clipped_momentum(
    momenta: list[Tensor],  # a side each: [L, n, n] with its own n
    deltas: list[Tensor],  # of the same shapes, wide
    found_inf: Tensor | None,  # one element
    riemannian_momentum: float,
    clip: str,
) -> Tensor:
    """Update m ← α₂m + (1−α₂)Δ in place. Return 1/max(1, ‖m‖), wide [sides, L] (Lin et al., ICML 2024, Fig. 7).

    Args:
        momenta: the sides of a batch of L blocks, FP64, FP32 or BF16 (rounded to nearest; the norm is taken before
            rounding). Other shapes [L, ...], such as diagonals [L, n], are allowed unless `clip` is "row_sum".
        deltas: Δ of each side. Overwritten.
        found_inf: every block is skipped unless it is 0.
        riemannian_momentum: α₂.
        clip: "frobenius", "row_sum" or "none".

    A block is skipped on every side if one of its sides is not finite: its m stay, and its factors are exactly 0, so
    that C − β₂·0·C·m is C.
    """
    for m, delta in zip(momenta, deltas, strict=True):
        delta.lerp_(m.to(delta.dtype), riemannian_momentum)
    norms = torch.stack([block_norm(new, clip) for new in deltas])
    ok = (norms < torch.inf).all(0)
    if found_inf is not None:
        ok = ok & (found_inf.reshape(()) == 0)
    for m, new in zip(momenta, deltas, strict=True):
        keep = ok.to(new.dtype).view(-1, *[1] * (new.dim() - 1))
        m.copy_(m.to(new.dtype).lerp_(new.nan_to_num_(0.0, 0.0, 0.0), keep))
    return torch.where(ok, 1.0 / norms.clamp(min=1.0), 0.0)
