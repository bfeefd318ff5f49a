"""One update of the Kronecker factors of a batch of blocks (Lin et al., ICML 2024, Fig. 5 right and Fig. 7).

    A   = CᵀGK
    Δ_C = ½[(B/d)·AAᵀ + (λ/d)·‖K‖²_F·CᵀC − γI],   Δ_K = ½[(B/p)·AᵀA + (λ/p)·‖C‖²_F·KᵀK − γI]
    m   ← α₂m + (1−α₂)Δ,    C ← C − β₂/max(1, ‖m_C‖)·C·m_C,    K ← K − β₂/max(1, ‖m_K‖)·K·m_K

The caption of Fig. 7 lost the factor C in front of m_C. With `relative_damping`, λq stands in the place of λ, with the
mean curvature q of the block (see `curvature`). With `factor_init="gradient"`, C and K start at (q(1+λ))^(−1/4)·I.

The whitened direction U = C·G·K needs C and K that are symmetric inverse roots of the curvature. Then

    Δ_C = ½[(B/d)·AAᵀ + √λ·(tr K/d)·C − γI],    Δ_K = ½[(B/p)·AᵀA + √λ·(tr C/p)·K − γI]
    C ← C − ½β₂/max(1, ‖m_C‖)·(C·m_C + m_C·C),    K ← K − ½β₂/max(1, ‖m_K‖)·(K·m_K + m_K·K)

Its damping is added to the root of the curvature, as eps is in Adam, and takes no product. The update is
(I − ½b·m)·C·(I − ½b·m) to first order in b.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rootfree_kernels import packing
from rootfree_kernels import rounding as rnd
from rootfree_kernels.arguments import Draws, FactorOptions, Factors, Gathered
from rootfree_kernels.eager.clipped_momentum import clipped_momentum
from rootfree_kernels.eager.common import Stored, cache_slices, some_blocks
from rootfree_kernels.eager.curvature import Curvature, follow
from rootfree_kernels.eager.products import curvature_step, gram

ClippedMomentum = Callable[["list[Tensor]", "list[Tensor]", "Tensor | None", float, str], Tensor]
"""`clipped_momentum` of any backend."""


def move_factor(factor: Stored, momentum: Tensor, scale: Tensor, matmul_dtype: torch.dtype, is_symmetric: bool) -> None:
    """Update C ← C − s·C·m in place, with s [L], or C ← C − ½s·(C·m + m·C) if C `is_symmetric`.

    The product reads only the BF16 half of a compensated pair.
    """
    product = torch.bmm(factor.value.to(matmul_dtype), momentum.to(matmul_dtype))
    product = product.to(torch.promote_types(product.dtype, torch.float32))
    if is_symmetric:
        product = product + product.mT
    moved = factor.load().addcmul_(product, scale[:, None, None], value=-0.5 if is_symmetric else -1.0)
    value, residual = factor.rounded(moved)
    factor.value.copy_(value)
    if factor.residual is not None and residual is not None:
        factor.residual.copy_(residual)


def kron_factor(
    factors: Factors,
    gathered: Gathered,
    draws: Draws,
    found_inf: Tensor | None,  # one element
    options: FactorOptions,
) -> Tensor:
    """Update C, K, m_C and m_K of a batch in place, both sides from the old factors. Return ok [L], bool.

    Products are taken in the dtype of `gathered.grad`. If P_C = CCᵀ and P_K = KKᵀ are given, they are computed again.
    A block with a non-finite norm stays as it was. Its `ok` is False. If `factors.curvature` is given, a block whose
    gradient is 0 stays too, and its `ok` is True.

    Args:
        factors: C, K and what belongs to them. m_C and m_K have the shapes of C and K, or are packed.
        gathered: what `kron_gather` returned.
        draws: seeds and steps of the L blocks.
        found_inf: unless it is 0, every block stays as it was.
    """
    return kron_factor_by(clipped_momentum, factors, gathered, draws, found_inf, options)


def kron_factor_by(
    step_momenta: ClippedMomentum,
    factors: Factors,
    gathered: Gathered,
    draws: Draws,
    found_inf: Tensor | None,
    options: FactorOptions,
) -> Tensor:
    """Update as `kron_factor` does, with momenta stepped by the `clipped_momentum` of any backend."""
    grad = gathered.grad
    parts = cache_slices(len(grad), grad.shape[1], grad.shape[2], grad.device)
    if len(parts) == 1:
        return _update_blocks(step_momenta, factors, grad, draws, found_inf, options)
    oks = []
    for part in parts:
        some, drawn = some_blocks(factors, part), some_blocks(draws, part)
        oks.append(_update_blocks(step_momenta, some, grad[part], drawn, found_inf, options))
    return torch.cat(oks)


def _update_blocks(
    step_momenta: ClippedMomentum,
    factors: Factors,
    grad: Tensor,
    draws: Draws,
    found_inf: Tensor | None,
    options: FactorOptions,
) -> Tensor:
    """Update as many blocks as are worked on at a time."""
    curvature = None if factors.curvature is None else _start(factors, grad, found_inf, options)
    is_symmetric = options.direction == "whitened"
    c, k = factors.factor_c.to(grad.dtype), factors.factor_k.to(grad.dtype)
    a = torch.bmm(torch.bmm(c.mT, grad), k)
    deltas = [curvature_step(a, c, k, options, curvature), curvature_step(a.mT, k, c, options, curvature)]
    kept = [factors.momentum_c, factors.momentum_k]
    momenta = [m if m.shape == x.shape else packing.unpack(m) for m, x in zip(kept, factors[:2], strict=True)]
    clips = step_momenta(momenta, deltas, found_inf, options.riemannian_momentum, options.clip)
    sides = (
        (factors.factor_c, factors.residual_c, momenta[0], factors.product_c, rnd.SLOT_FACTOR_C),
        (factors.factor_k, factors.residual_k, momenta[1], factors.product_k, rnd.SLOT_FACTOR_K),
    )
    for (factor, residual, momentum, product, slot), clip_factor in zip(sides, clips, strict=True):
        bits = (rnd.SymmetricBits if is_symmetric else rnd.BlockBits)(draws.seeds, draws.steps, slot, factor[0].numel())
        stored = Stored(factor, residual, options.rounding, bits)
        move_factor(stored, momentum, options.beta2 * clip_factor, grad.dtype, is_symmetric)
        if product is not None:
            gram(factor.to(product.dtype), out=product)
    for momentum, packed in zip(momenta, kept, strict=True):
        if momentum is not packed:
            packing.pack(momentum, out=packed)
    ok = clips[0] > 0
    if curvature is None or factors.curvature is None:
        return ok
    factors.curvature.copy_(torch.where(ok, curvature.new, factors.curvature))
    return ok | curvature.idle


def _start(factors: Factors, grad: Tensor, found_inf: Tensor | None, options: FactorOptions) -> Curvature:
    """Return the curvature of the blocks. Start C and K of those whose first gradient has come."""
    assert factors.curvature is not None  # a caller without one does not ask
    old, numel = factors.curvature, grad[0].numel()
    norms = torch.linalg.vector_norm(grad.to(old.dtype), dim=(-2, -1))
    curvature = follow(old, norms.square_().mul_(options.batch_size / numel), found_inf)
    if options.factor_init == "gradient":
        starts, scale = curvature.starts[:, None, None], (curvature.new * (1 + options.damping)) ** -0.25
        for factor, residual in ((factors.factor_c, factors.residual_c), (factors.factor_k, factors.residual_k)):
            identity = torch.eye(factor.shape[-1], dtype=scale.dtype, device=scale.device)
            new_value, new_residual = Stored(factor, residual, "nearest", _no_bits).rounded(
                scale[:, None, None] * identity
            )
            factor.copy_(torch.where(starts, new_value, factor))
            if residual is not None and new_residual is not None:
                residual.copy_(torch.where(starts, new_residual, residual))
    return curvature


def _no_bits() -> Tensor:
    raise AssertionError("rounding to nearest draws no bits")
