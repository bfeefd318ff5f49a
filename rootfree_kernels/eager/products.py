"""Symmetric products: XXᵀ, the curvature Δ of one side, and P_C = CCᵀ and P_K = KKᵀ of the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from rootfree_kernels.arguments import FactorOptions
from rootfree_kernels.eager.common import WIDE, cache_slices
from rootfree_kernels.eager.curvature import Curvature


def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return XXᵀ [L, n, n] of X [L, n, k].

    The result is symmetric, so a CPU copies one of its four quarters from the mirror image. In BF16, and for small n,
    three smaller products take longer than the whole one.
    """
    size = x.shape[-2]
    if out is None:
        out = x.new_empty((x.shape[0], size, size))
    if x.device.type != "cpu" or x.dtype not in WIDE or size < 128:
        return torch.bmm(x, x.mT, out=out)
    half = size // 2
    upper, lower = x[:, :half], x[:, half:]
    torch.bmm(upper, upper.mT, out=out[:, :half, :half])
    torch.bmm(lower, lower.mT, out=out[:, half:, half:])
    torch.bmm(lower, upper.mT, out=out[:, half:, :half])
    out[:, :half, half:] = out[:, half:, :half].mT
    return out


def curvature_step(
    a: Tensor,  # A [L, p, d]
    factor: Tensor,  # C [L, p, p]
    other: Tensor,  # K [L, d, d]
    options: FactorOptions,
    curvature: Curvature | None = None,  # of L blocks
) -> Tensor:
    """Return Δ_C, wide [L, p, p]: see `rootfree_kernels.eager.kron_factor`.

    Pass Aᵀ, K and C for Δ_K. The trace in the damping is a squared norm of K, which needs no product. The diagonal is
    NaN where the gradient is 0, so that the block is left as it is.
    """
    cols, wide_dtype = a.shape[-1], torch.promote_types(a.dtype, torch.float32)
    delta = gram(a).to(wide_dtype).mul_(options.batch_size / (2 * cols))
    if options.damping:
        relative = None
        if options.relative_damping and curvature is not None:
            relative = curvature.new.to(wide_dtype)[:, None, None]
        if options.direction == "whitened":
            weight = other.diagonal(dim1=-2, dim2=-1).to(wide_dtype).mean(-1)[:, None, None]
            weight = weight if relative is None else weight * relative.sqrt()
            delta.addcmul_(factor.to(wide_dtype), weight, value=0.5 * options.damping**0.5)
        else:
            trace = torch.linalg.vector_norm(other.to(wide_dtype), dim=(-2, -1), keepdim=True).square_()
            trace = trace if relative is None else trace * relative
            delta.addcmul_(gram(factor.mT).to(wide_dtype), trace, value=options.damping / (2 * cols))
    diagonal = delta.diagonal(dim1=-2, dim2=-1)
    if curvature is None:
        diagonal.sub_(options.gamma / 2)
    else:
        diagonal.sub_(torch.where(curvature.idle, torch.nan, options.gamma / 2).to(wide_dtype)[:, None])
    return delta


def kron_products(factor_c: Tensor, factor_k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return P_C = CCᵀ [L, p, p] and P_K = KKᵀ [L, d, d] in `dtype`, from C [L, p, p] and K [L, d, d].

    They are bitwise those that `kron_factor` writes, so that a resumed run repeats the original one.
    """
    products = factor_c.new_empty(factor_c.shape, dtype=dtype), factor_k.new_empty(factor_k.shape, dtype=dtype)
    for part in cache_slices(len(factor_c), factor_c.shape[-1], factor_k.shape[-1], factor_c.device):
        for factor, product in zip((factor_c, factor_k), products, strict=True):
            gram(factor[part].to(dtype), out=product[part])
    return products
