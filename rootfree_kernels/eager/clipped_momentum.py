"""The normalised Riemannian momentum: m ← α₂m + (1−α₂)Δ, and the factor 1/max(1, ‖m‖) that clips its step."""

from __future__ import annotations

import torch
from torch import Tensor

from rootfree_kernels.eager.common import as_scalar


def block_norm(m: Tensor, clip: str) -> Tensor:
    """‖m‖ [L] of blocks m [L, ...]: Frobenius' norm over all axes but the first, or, of symmetric blocks [L, n, n], the
    largest absolute row sum (never below the largest singular value). `clip="none"` gives 0, so that nothing is
    clipped, but NaN where m is not finite."""
    if clip == "row_sum":
        return torch.linalg.vector_norm(m, 1, dim=-1).amax(-1)
    norm = torch.linalg.vector_norm(m, dim=tuple(range(1, m.dim())))
    return norm if clip == "frobenius" else norm * 0.0


def clipped_momentum(
    momenta: list[Tensor],
    deltas: list[Tensor],
    found_inf: Tensor | None,
    riemannian_momentum: float,
    clip: str,
) -> Tensor:
    """m ← α₂m + (1−α₂)Δ in place; gives 1/max(1, ‖m‖), wide [sides, L] (Lin et al., ICML 2024, Fig. 7).

    Args:
        momenta: the sides of a batch of L blocks, each [L, n, n] with an n of its own (or [L, ...], such as diagonals
            [L, n], where `clip` is not "row_sum"), FP64, FP32 or BF16 (rounded to nearest; ‖m‖ is that of the unrounded
            value). Changed in place.
        deltas: Δ of each side, of the same shapes, wide. Overwritten.
        found_inf: 0-d or [1]; unless it is 0 every block is skipped.
        riemannian_momentum: α₂.
        clip: "frobenius", "row_sum" or "none".

    A block of which any side is not finite is skipped on every side: its m stay, and its factors are exactly 0, so
    that C − β₂·0·Cm is C.
    """
    for m, delta in zip(momenta, deltas, strict=True):
        delta.lerp_(m.to(delta.dtype), riemannian_momentum)
    norms = torch.stack([block_norm(new, clip) for new in deltas])
    ok = (norms < torch.inf).all(0)
    if found_inf is not None:
        ok = ok & (as_scalar(found_inf) == 0)
    for m, new in zip(momenta, deltas, strict=True):
        keep = ok.to(new.dtype).view(-1, *[1] * (new.dim() - 1))
        m.copy_(m.to(new.dtype).lerp_(new.nan_to_num_(0.0, 0.0, 0.0), keep))
    return torch.where(ok, 1.0 / norms.clamp(min=1.0), 0.0)
