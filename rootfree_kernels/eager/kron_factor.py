"""IF-Shampoo over batches of blocks: the update of the Kronecker factors and the preconditioned step of the weights.

Shapes, for L blocks of p × d: G [L, p, d]; C, m_C [L, p, p]; K, m_K [L, d, d]. S⁻¹ = (CCᵀ) ⊗ (KKᵀ).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rootfree_kernels import ranges
from rootfree_kernels import rounding as rnd
from rootfree_kernels.blocks import blocks_of, tiles_of_numbers
from rootfree_kernels.eager.clipped_momentum import clipped_momentum
from rootfree_kernels.eager.common import WIDE, Stored, as_scalar, heavy_ball_, wide
from rootfree_kernels.packing import as_matrices, put_back

CACHE_NUMBERS = 1 << 18
"""Numbers of G that a CPU works on at a time: half a dozen FP32 tensors of this size (6 MiB) stay near a core."""


def padded_side(size: int) -> int:
    """The side of G that a backend makes of a block's: here the same."""
    return size


def num_partial_sums(rows: int, cols: int) -> int:
    """Numbers a block that `kron_gather` hands on beside G: here none."""
    return 0


def kron_gather(
    grads: list[Tensor],
    tiles: list[int],
    rows: int,
    cols: int,
    factors: list[Tensor],
    grad_scale: Tensor | None,
    dtype: torch.dtype,
    maximize: bool,
) -> tuple[Tensor, Tensor]:
    """G [L, p, d] in `dtype` from one tile of each gradient, of any dtype and strides, divided by the 0-d `grad_scale`.

    `tiles` are the tiles' `Tile.numbers`, end to end; `rows` and `cols` are p and d. The second tensor belongs to the
    backend, which hands it on to `kron_factor` and `kron_step`: kernels sum up squares of G, and of the `factors` C and
    K that an update is going to damp by, on the way. Eager PyTorch leaves it empty and takes norms where it needs them.
    """
    blocks = blocks_of(grads, tiles_of_numbers(tiles, rows, cols))
    if all(block.dtype == dtype for block in blocks):
        batch = torch.stack(blocks)
    else:  # cast on the way, without a second copy
        batch = blocks[0].new_empty((len(blocks), rows, cols), dtype=dtype)
        torch._foreach_copy_(list(batch.unbind()), blocks)
    if grad_scale is not None:
        batch.div_(as_scalar(grad_scale))
    return batch.neg_() if maximize else batch, batch.new_empty((1 + len(factors), len(blocks), 0), dtype=torch.float32)


def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """XXᵀ [L, n, n] of X [L, n, k].

    It is symmetric, so that a CPU takes one of the four quarters of the result from its mirror image. Not so in BF16,
    or for small n, where three smaller products take longer than the whole one.
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


def curvature_step(a: Tensor, factor: Tensor, other: Tensor, batch_size: float, damping: float, gamma: float) -> Tensor:
    """Δ_C = ½[(B/d)·AAᵀ + (λ/d)·‖K‖²_F·CᵀC − γI], wide [L, p, p], from A [L, p, d], C and the other factor K [L, d, d].

    Δ_K is the same of Aᵀ, K and C. The trace in the damping is a squared norm of K: it needs no product.
    """
    cols = a.shape[-1]
    delta = wide(gram(a)).mul_(batch_size / (2 * cols))
    if damping:
        trace = torch.linalg.vector_norm(wide(other), dim=(-2, -1), keepdim=True).square_()
        delta.addcmul_(wide(gram(factor.mT)), trace, value=damping / (2 * cols))
    delta.diagonal(dim1=-2, dim2=-1).sub_(gamma / 2)
    return delta


def move_factor(factor: Stored, momentum: Tensor, scale: Tensor, matmul_dtype: torch.dtype) -> None:
    """C ← C − s·C·m in place, with s [L]; the product reads the BF16 half of a compensated pair alone."""
    product = torch.bmm(factor.value.to(matmul_dtype), momentum.to(matmul_dtype))
    moved = factor.load().addcmul_(wide(product), scale[:, None, None], value=-1.0)
    value, residual = factor.rounded(moved)
    factor.value.copy_(value)
    if factor.residual is not None and residual is not None:
        factor.residual.copy_(residual)


def cache_slices(num_blocks: int, rows: int, cols: int, device: torch.device) -> list[slice]:
    """Slices of L blocks of p × d that are worked through one after the other: on a CPU, as many blocks as its cache
    holds together with what is made of them; elsewhere all."""
    step = max(1, CACHE_NUMBERS // (rows * cols)) if device.type == "cpu" else num_blocks
    return [slice(start, start + step) for start in range(0, num_blocks, step)]


def kron_products(factor_c: Tensor, factor_k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P_C = CCᵀ and P_K = KKᵀ in `dtype`, as `kron_factor` makes them: a resumed run has the same ones to the bit."""
    products = factor_c.new_empty(factor_c.shape, dtype=dtype), factor_k.new_empty(factor_k.shape, dtype=dtype)
    for part in cache_slices(len(factor_c), factor_c.shape[-1], factor_k.shape[-1], factor_c.device):
        for factor, product in zip((factor_c, factor_k), products, strict=True):
            gram(factor[part].to(dtype), out=product[part])
    return products


def part_of(blocks: tuple[Any, ...], part: slice) -> list[Any]:
    """A slice of everything that has an entry for each block, tensors and lists; None stays None."""
    return [x if x is None else x[part] for x in blocks]


def kron_factor(
    factor_c: Tensor,
    factor_k: Tensor,
    momentum_c: Tensor,
    momentum_k: Tensor,
    residual_c: Tensor | None,
    residual_k: Tensor | None,
    product_c: Tensor | None,
    product_k: Tensor | None,
    grad: Tensor,
    squares: Tensor,
    seeds: Tensor,
    steps: Tensor,
    found_inf: Tensor | None,
    batch_size: float,
    beta2: float,
    riemannian_momentum: float,
    damping: float,
    gamma: float,
    clip: str,
    rounding: str,
) -> Tensor:
    """One update of C, K, m_C and m_K in place, both sides from the old factors; gives ok [L], bool.

        A   = CᵀGK
        Δ_C = ½[(B/d)·AAᵀ + (λ/d)·‖K‖²_F·CᵀC − γI],   Δ_K = ½[(B/p)·AᵀA + (λ/p)·‖C‖²_F·KᵀK − γI]
        m   ← α₂m + (1−α₂)Δ,    C ← C − β₂/max(1, ‖m_C‖)·C·m_C,    K ← K − β₂/max(1, ‖m_K‖)·K·m_K

    (Lin et al., ICML 2024, Fig. 5 right and Fig. 7, with the factor C in front of m_C that its caption lost.)
    Products are taken in the dtype of `grad`. Where P_C = CCᵀ and P_K = KKᵀ are given, they are made anew. A block
    with a non-finite norm stays as it was, and its `ok` is False. `squares` is what `kron_gather` handed out. m_C and
    m_K have the shapes of C and K, or are packed (`rootfree_kernels.packing`).
    """
    parts = cache_slices(len(grad), grad.shape[1], grad.shape[2], grad.device)
    if len(parts) > 1:
        factors: tuple[Any, ...] = (factor_c, factor_k, momentum_c, momentum_k)
        optional: tuple[Any, ...] = (residual_c, residual_k, product_c, product_k)
        draws: tuple[Any, ...] = (seeds, steps)
        rest: tuple[Any, ...] = (found_inf, batch_size, beta2, riemannian_momentum, damping, gamma, clip, rounding)
        oks = []
        for part in parts:
            arguments = [*part_of((*factors, *optional, grad), part), squares, *part_of(draws, part), *rest]
            oks.append(kron_factor(*arguments))
        return torch.cat(oks)

    c, k = factor_c.to(grad.dtype), factor_k.to(grad.dtype)
    a = torch.bmm(torch.bmm(c.mT, grad), k)
    deltas = [
        curvature_step(a, c, k, batch_size, damping, gamma),
        curvature_step(a.mT, k, c, batch_size, damping, gamma),
    ]
    momenta = [as_matrices(momentum_c, factor_c), as_matrices(momentum_k, factor_k)]
    clips = clipped_momentum(momenta, deltas, found_inf, riemannian_momentum, clip)
    sides = (
        (factor_c, residual_c, momenta[0], product_c, rnd.SLOT_FACTOR_C),
        (factor_k, residual_k, momenta[1], product_k, rnd.SLOT_FACTOR_K),
    )
    for (factor, residual, momentum, product, slot), clip_factor in zip(sides, clips, strict=True):
        draw = rnd.BlockBits(seeds, steps, slot, factor[0].numel())
        move_factor(Stored(factor, residual, rounding, draw), momentum, beta2 * clip_factor, grad.dtype)
        if product is not None:
            gram(factor.to(product.dtype), out=product)
    put_back(momenta[0], momentum_c)
    put_back(momenta[1], momentum_k)
    return clips[0] > 0


def precondition_(factor_c: Tensor, factor_k: Tensor, cached: bool, grad: Tensor) -> Tensor:
    """G ← U = CCᵀ·G·KKᵀ [L, p, d], in the memory of `grad`.

    With `cached` the factors are P_C = CCᵀ and P_K = KKᵀ, which saves half the work.
    """
    c, k = factor_c.to(grad.dtype), factor_k.to(grad.dtype)
    if cached:
        return torch.bmm(torch.bmm(c, grad), k, out=grad)
    half = torch.bmm(c.mT, grad)
    torch.bmm(half, k, out=grad)
    return torch.bmm(torch.bmm(c, grad, out=half), k.mT, out=grad)


def kron_step(
    params: list[Tensor],
    buffers: list[Tensor],
    residuals: list[Tensor],
    tiles: list[int],
    skipped: Tensor,
    factor_c: Tensor,
    factor_k: Tensor,
    grad: Tensor,
    squares: Tensor,
    lr: Tensor,
    ok: Tensor | None,
    seeds: Tensor,
    steps: Tensor,
    found_inf: Tensor | None,
    cached: bool,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    rounding: str,
) -> None:
    """The preconditioned step of L blocks [p, d] of weights, in place:

        U = CCᵀ·G·KKᵀ,    buf ← α₁buf + U + κW,    W ← W − β₁buf

    `grad` is G, and is overwritten; `squares` and `tiles` are those of its `kron_gather`. With `cached` the factors are
    P_C = CCᵀ and P_K = KKᵀ. `params`, `buffers` (and `residuals`, int16, for compensated BF16 weights, else none) are
    contiguous, or have two axes. A block whose ‖G‖ is not finite, or whose `ok` [L] says that its factors were skipped,
    keeps weights and buffer, and its `skipped` [L] grows by one. A number of U that is not finite counts as 0.
    """
    every_tile = tiles_of_numbers(tiles, *grad.shape[1:])
    blocks: tuple[Any, ...] = tuple(blocks_of(x, every_tile) if x else x for x in (params, buffers, residuals))
    for part in cache_slices(len(grad), grad.shape[1], grad.shape[2], grad.device):
        some = part_of((*blocks, skipped, factor_c, factor_k, grad, ok, seeds, steps), part)
        arguments = [*some, lr, found_inf, cached, momentum, weight_decay, decoupled, rounding]
        _step_blocks(*arguments)
    ranges.end_phase()


def _step_blocks(
    params: list[Tensor],
    buffers: list[Tensor],
    residuals: list[Tensor],
    skipped: Tensor,
    factor_c: Tensor,
    factor_k: Tensor,
    grad: Tensor,
    ok: Tensor | None,
    seeds: Tensor,
    steps: Tensor,
    lr: Tensor,
    found_inf: Tensor | None,
    cached: bool,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    rounding: str,
) -> None:
    """`kron_step` of as many blocks as are worked on at a time."""
    ranges.phase("precondition")
    finite = torch.linalg.vector_norm(wide(grad), dim=(-2, -1)) < torch.inf
    if ok is not None:
        finite = finite & ok
    if found_inf is not None:
        finite = finite & (as_scalar(found_inf) == 0)
    skipped.add_(~finite)

    direction = wide(precondition_(factor_c, factor_k, cached, grad))

    ranges.phase("apply")
    draw = rnd.BlockBits(seeds, steps, rnd.SLOT_WEIGHT, grad[0].numel())
    weight = _as_batch(params, residuals, rounding, draw)
    buffer = _as_batch(buffers, [], "nearest", draw)
    wide_weights = params if weight is None else list(weight.load().unbind())
    wide_buffers = buffers if buffer is None else list(buffer.load().unbind())
    direction = direction.nan_to_num_(0.0, 0.0, 0.0).to(wide_buffers[0].dtype)
    keep = finite.to(direction.dtype)
    heavy_ball_(wide_weights, wide_buffers, list(direction.unbind()), keep, lr, momentum, weight_decay, decoupled)
    if weight is not None:
        _store_batch(weight, wide_weights, params, residuals)
    if buffer is not None:
        _store_batch(buffer, wide_buffers, buffers, [])


def _as_batch(tensors: list[Tensor], residuals: list[Tensor], mode: str, draw_bits: rnd.BlockBits) -> Stored | None:
    """Blocks of a narrow dtype as one batch to load and to round; None for wide ones, which are stepped in place."""
    if tensors[0].dtype in WIDE:
        return None
    residual = torch.stack(residuals) if residuals else None
    return Stored(torch.stack(tensors), residual, mode, draw_bits)


def _store_batch(stored: Stored, new: list[Tensor], tensors: list[Tensor], residuals: list[Tensor]) -> None:
    value, residual = stored.rounded(torch.stack(new))
    torch._foreach_copy_(tensors, list(value.unbind()))
    if residual is not None:
        torch._foreach_copy_(residuals, list(residual.unbind()))
