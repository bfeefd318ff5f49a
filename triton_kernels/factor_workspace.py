"""The temporary memory in which `kron_factor` works, and the copies back to the state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.arguments import Factors, Gathered
from rootfree_kernels.packing import put_back
from rootfree_kernels.triton_kernels.products import TileConfig, pad_square, tile_config


class FactorWorkspace(NamedTuple):
    """Temporary memory of an update, all of which is allocated before anything changes.

    p and d are padded here. Factors, momenta and residuals are those of the state, or copies if these need padding.
    """

    config: TileConfig
    num_tiles: int  # of a block: those of the lower triangles of both sides
    factors: tuple[Tensor, Tensor]  # C [L, p, p] and K [L, d, d]
    momenta: tuple[Tensor, Tensor]  # m_C and m_K
    residuals: tuple[Tensor, Tensor] | None
    new_factors: tuple[Tensor, Tensor]  # C' and K'
    new_momenta: tuple[Tensor, Tensor]  # m' of both sides
    x: Tensor  # CᵀG [L, p, d]
    a: Tensor  # A = CᵀGK [L, p, d]
    norms: Tensor  # [L, 2] if the norm is a row sum, otherwise [L, num_tiles]: partial sums of squares
    row_sums: tuple[Tensor, Tensor]  # partial row sums [L, tiles, p] and [L, tiles, d]; unused for other norms
    products: tuple[Tensor, Tensor] | None  # P_C and P_K; none for the whitened direction
    curvature: Tensor | None  # q [L], FP32
    weights: Tensor  # [L, 4], FP32, of `kron_start`; a stand-in for the paper's rule
    ok: Tensor  # [L], bool

    @property
    def is_weighted(self) -> bool:
        """Whether `weights` are written and read."""
        return self.weights.dim() == 2


def allocate(
    factors: Factors, momenta: tuple[Tensor, Tensor], gathered: Gathered, row_sum: bool, is_whitened: bool
) -> FactorWorkspace:
    """Return the memory of an update. `momenta` are m_C [L, p, p] and m_K [L, d, d], not packed."""
    grad, squares = gathered
    num_blocks, *sides = grad.shape
    config = tile_config(factors.factor_c.shape[-1], factors.factor_k.shape[-1])
    c, k, m_c, m_k = map(pad_square, (factors.factor_c, factors.factor_k, *momenta))
    residuals = None
    if factors.residual_c is not None and factors.residual_k is not None:
        residuals = pad_square(factors.residual_c), pad_square(factors.residual_k)
    new_c, new_k, new_m_c, new_m_k = map(torch.empty_like, (c, k, m_c, m_k))
    x, a = torch.empty_like(grad), torch.empty_like(grad)
    num_tiles = config.triangle(sides[0]) + config.triangle(sides[1])
    norms = squares.new_empty((num_blocks, 2 if row_sum else num_tiles))
    row_sums = norms, norms
    if row_sum:
        sums_c, sums_k = (squares.new_empty((num_blocks, config.tiles(n), n)) for n in sides)
        row_sums = sums_c, sums_k
    ok = squares.new_empty(num_blocks, dtype=torch.bool)
    curvature, weights = factors.curvature, squares
    if is_whitened or curvature is not None:
        weights = squares.new_empty((num_blocks, 4))
    state, new = ((c, k), (m_c, m_k), residuals), ((new_c, new_k), (new_m_c, new_m_k))
    products = None if is_whitened else _products(factors, c, k)
    return FactorWorkspace(config, num_tiles, *state, *new, x, a, norms, row_sums, products, curvature, weights, ok)


def _products(factors: Factors, c: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return where P_C and P_K are written: into those that are kept if they need no padding."""
    product_c, product_k = factors.product_c, factors.product_k
    if product_c is None or product_k is None or product_c.shape != c.shape or product_k.shape != k.shape:
        return torch.empty_like(c), torch.empty_like(k)
    return product_c, product_k


def write_back(factors: Factors, momenta: tuple[Tensor, Tensor], work: FactorWorkspace) -> None:
    """Copy padded or unpacked copies back to the state, and tell autograd which tensors were changed."""
    kept = (*factors[:2], *momenta, *factors[4:])
    residuals, products = work.residuals or (None, None), work.products or (None, None)
    worked_on = (*work.factors, *work.momenta, *residuals, *products, work.curvature)
    for x, worked in zip(kept, worked_on, strict=True):
        if x is not None and worked is not None and x is not worked:
            n = x.shape[-1]
            x.copy_(worked[:, :n, :n])
    put_back(momenta[0], factors.momentum_c)
    put_back(momenta[1], factors.momentum_k)
    torch.autograd.graph.increment_version([x for x in kept if x is not None])
