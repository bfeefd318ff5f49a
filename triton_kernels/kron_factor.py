"""One update of the Kronecker factors of a batch, in five launches whatever the number of blocks, or six where the norm
is the largest row sum (Lin et al., ICML 2024, Fig. 5 right and Fig. 7):

    1, 2  A = CᵀGK                                                               cuBLAS, batched
    3     m' = α₂m + (1−α₂)·½[(B/d)·AAᵀ + (λ/d)·‖K‖²_F·CᵀC − γI], ‖m'‖          likewise m_K, K' and P_K in the
    4     C' = C − β₂/max(1, ‖m'‖)·C·m', rounded;  m ← m'                        same launches
    5     P_C = C'C'ᵀ;  C ← C'

With `clip="row_sum"`, a small launch between 3 and 4 makes ‖m'‖ of the row sums that 3 leaves (see `kron_norms`).

Results of 3 and 4 wait in memory of their own until it is known whether the block is finite on both sides: nothing that
is not enters the state. No launch depends on another one's order of programs, so a run repeats bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from rootfree_kernels.arguments import Draws, FactorOptions, Factors, Gathered
from rootfree_kernels.packing import as_matrices, put_back
from rootfree_kernels.pointer_tables.tables import on_device, random_bits
from rootfree_kernels.rounding import SLOT_FACTOR_C, SLOT_FACTOR_K
from rootfree_kernels.triton_kernels.common import (
    effective_rounding,
    is_finite,
    load_stored,
    only_if,
    random_key,
    round_nearest,
    store_rounded,
    sum_of_parts,
    triangle_tile,
)
from rootfree_kernels.triton_kernels.configuration import Configuration
from rootfree_kernels.triton_kernels.kron_norms import both_norms, make_norms
from rootfree_kernels.triton_kernels.launch import kernel, launch
from rootfree_kernels.triton_kernels.products import (
    TILE_CONFIGS,
    MakeProducts,
    TileConfig,
    make_products,
    pad_square,
    part_of_tile,
    product_nn,
    product_nt,
    product_tn,
    quarter,
    side_and_tile,
    store_symmetric,
    tile_config,
)
from rootfree_kernels.triton_kernels.sizes import PADDING

_SLOT_C, _SLOT_K = tl.constexpr(SLOT_FACTOR_C), tl.constexpr(SLOT_FACTOR_K)


@kernel
def kron_momentum_kernel(
    a_ptr,
    c_ptr,
    k_ptr,
    m_c_ptr,
    m_k_ptr,
    new_m_c_ptr,
    new_m_k_ptr,
    squares_ptr,
    norms_ptr,
    row_sums_c_ptr,
    row_sums_k_ptr,
    num_blocks,
    num_parts,
    p,
    d,
    p8,
    d8,
    batch_size,
    alpha2,
    damping,
    gamma,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    ROW_SUM: tl.constexpr,
):
    block, is_c, t = side_and_tile(p8 * 8, d8 * 8, BLOCK)
    n = tl.where(is_c, p8, d8) * 8
    inner = tl.where(is_c, d8, p8) * 8
    start = block * n * n
    i, j = triangle_tile(t)
    row, col = i * BLOCK, j * BLOCK

    # λ·‖K‖²_F·CᵀC first, scaled so that B/2d of the sum is Δ; no product where λ is 0.
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    x_ptr = tl.where(is_c, c_ptr, k_ptr) + start
    acc = product_tn(x_ptr, row, col, n, tl.where(damping > 0.0, n, 0), acc, BLOCK, DEPTH)
    side = tl.where(is_c, 2, 1)  # of the other factor's squares
    parts_ptr = squares_ptr + (side * num_blocks + block) * num_parts
    acc *= damping / batch_size * sum_of_parts(parts_ptr, tl.where(damping > 0.0, num_parts, 0))

    # Then AAᵀ or AᵀA. One of the loops runs no times: two arms of a branch would take the memory of both.
    a_ptr += block * n * inner
    acc = product_nt(a_ptr, row, col, n, tl.where(is_c, inner, 0), acc, BLOCK, DEPTH)
    acc = product_tn(a_ptr, row, col, n, tl.where(is_c, 0, inner), acc, BLOCK, DEPTH)

    m_ptr = tl.where(is_c, m_c_ptr, m_k_ptr) + start
    new_m_ptr = tl.where(is_c, new_m_c_ptr, new_m_k_ptr) + start
    scale = batch_size / (2.0 * tl.where(is_c, d, p))
    size = tl.where(is_c, p, d)  # beyond it lies padding
    tiles, index = tl.cdiv(n, BLOCK), tl.arange(0, BLOCK)
    sums_ptr = tl.where(is_c, row_sums_c_ptr, row_sums_k_ptr) + block * tiles * n
    # The branches on `whole` and on the diagonal save registers: without them Triton 3.6 moves m between layouts twice,
    # in FP32, and spills on sm_90.
    whole = (row + BLOCK <= n) & (col + BLOCK <= n)
    square, row_sum = 0.0, tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(4):
        tile, a, b, offsets, mask = part_of_tile(row, col, n, part, BLOCK)
        on_diagonal = (row + a == col + b) & (row + a < size)
        delta = quarter(acc, part) * scale
        if i == j:
            delta -= tl.where(on_diagonal, 0.5 * gamma, 0.0)
        if whole:
            m = tl.load(m_ptr + tile + offsets).to(tl.float32)
        else:
            m = tl.load(m_ptr + tile + offsets, mask=mask, other=0.0).to(tl.float32)
        m = alpha2 * m + (1.0 - alpha2) * delta
        store_symmetric(round_nearest(m, new_m_ptr.dtype.element_ty), new_m_ptr, row, col, n, part, BLOCK)
        if ROW_SUM:
            row_sum += tl.sum(tl.abs(m), axis=1)
            if i != j:
                below = col + part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
                tl.store(sums_ptr + i * n + below, tl.sum(tl.abs(m), axis=0), mask=below < n)
        else:
            square += tl.sum(m * m)
    if ROW_SUM:
        tl.store(sums_ptr + j * n + row + index, row_sum, mask=row + index < n)
    else:
        tl.store(norms_ptr + tl.program_id(0), square * tl.where(i == j, 1.0, 2.0))


@kernel
def kron_factor_kernel(
    c_ptr,
    k_ptr,
    new_m_c_ptr,
    new_m_k_ptr,
    new_c_ptr,
    new_k_ptr,
    m_c_ptr,
    m_k_ptr,
    residual_c_ptr,
    residual_k_ptr,
    norms_ptr,
    seeds_ptr,
    steps_ptr,
    found_inf_ptr,
    ok_ptr,
    seed_stride,
    step_stride,
    p,
    d,
    p8,
    d8,
    step_value,
    beta2,
    clipped,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    ROW_SUM: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    tiles_p, tiles_d = tl.cdiv(p8 * 8, BLOCK), tl.cdiv(d8 * 8, BLOCK)
    per_block = tiles_p * tiles_p + tiles_d * tiles_d
    block = (tl.program_id(0) // per_block).to(tl.int64)
    t = tl.program_id(0) % per_block
    is_c = t < tiles_p * tiles_p
    tile, tiles = tl.where(is_c, t, t - tiles_p * tiles_p), tl.where(is_c, tiles_p, tiles_d)
    row, col = tile // tiles * BLOCK, tile % tiles * BLOCK
    n = tl.where(is_c, p8, d8) * 8
    start = block * n * n

    x_ptr = tl.where(is_c, c_ptr, k_ptr) + start
    new_m_ptr = tl.where(is_c, new_m_c_ptr, new_m_k_ptr) + start
    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    product = product_nn(x_ptr, new_m_ptr, row, col, n, n, n, product, BLOCK, DEPTH)

    norm_c, norm_k = both_norms(norms_ptr, block, p8 * 8, d8 * 8, BLOCK, ROW_SUM)
    ok = is_finite(norm_c) & is_finite(norm_k) & (tl.load(found_inf_ptr) == 0.0)
    norm = tl.where(is_c, norm_c, norm_k)
    scale = beta2 / tl.where(clipped != 0, tl.maximum(norm, 1.0), 1.0)
    if t == 0:
        tl.store(ok_ptr + block, ok)

    seed, step = tl.load(seeds_ptr + block * seed_stride), step_value + tl.load(steps_ptr + block * step_stride)
    key = tl.where(is_c, random_key(seed, step, _SLOT_C), random_key(seed, step, _SLOT_K))
    new_ptr = tl.where(is_c, new_c_ptr, new_k_ptr) + start
    residual_ptr = tl.where(is_c, residual_c_ptr, residual_k_ptr) + start
    m_ptr = tl.where(is_c, m_c_ptr, m_k_ptr) + start
    for part in tl.static_range(4):
        tile, i, j, offsets, mask = part_of_tile(row, col, n, part, BLOCK)
        old = load_stored(x_ptr + tile, residual_ptr + tile, offsets, mask, ROUNDING)
        new = tl.where(ok, old - scale * quarter(product, part), old)
        index = (row + i) * tl.where(is_c, p, d) + (col + j)
        store_rounded(new, new_ptr + tile, residual_ptr + tile, offsets, mask, key, index, ROUNDING)
        mask = only_if(ok, mask)
        tl.store(m_ptr + tile + offsets, tl.load(new_m_ptr + tile + offsets, mask=mask), mask=mask)


def configurations() -> Iterator[Configuration]:
    for config in TILE_CONFIGS:
        block, depth, num_warps, num_stages, max_registers = config
        for row_sum in (False, True):
            yield Configuration(
                kron_momentum_kernel,
                (*("*bf16",) * 7, *("*fp32",) * 4, *("i32",) * 6, *("fp32",) * 4),
                (block, depth, row_sum),
                num_warps,
                num_stages,
                kind="matrix",
                max_registers=max_registers,
            )
            for rounding in ("stochastic", "compensated", "nearest"):
                yield Configuration(
                    kron_factor_kernel,
                    (
                        *(*("*bf16",) * 8, "*i16", "*i16", "*fp32"),
                        *("*i32", "*fp32", "*fp32", "*i1", *("i32",) * 6, "fp32", "fp32", "i32"),
                    ),
                    (block, depth, row_sum, rounding),
                    num_warps,
                    num_stages,
                    kind="matrix",
                )


class Workspace(NamedTuple):
    """What an update works on: padded factors and momenta, and memory for results that wait until they are known to be
    finite. All of it is taken before anything changes."""

    config: TileConfig
    num_tiles: int  # of both triangles of a block
    state: tuple[Tensor | None, ...]  # C, K, m_C, m_K and residuals, or padded copies of those with other sides
    new: tuple[Tensor, ...]  # C, K, m_C and m_K
    x: Tensor  # CᵀG [L, p, d]
    a: Tensor  # A = CᵀGK [L, p, d]
    norms: Tensor  # [L, 2] for row sums, else [L, num_tiles]: parts of squared Frobenius norms
    row_sums: tuple[Tensor, Tensor]  # [L, tiles, n] of each side, for `clip="row_sum"`
    products: tuple[Tensor, Tensor]  # P_C and P_K
    ok: Tensor  # [L]


def _workspace(factors: Factors, momenta: list[Tensor], gathered: Gathered, row_sum: bool) -> Workspace:
    """Return the memory of an update. `momenta` are m_C [L, p, p] and m_K [L, d, d]."""
    grad, squares = gathered
    num_blocks, *sides = grad.shape
    config = tile_config(factors.factor_c.shape[-1], factors.factor_k.shape[-1])
    kept = (*factors[:2], *momenta, factors.residual_c, factors.residual_k)
    state = tuple([x if x is None else pad_square(x) for x in kept])
    c, k = state[0], state[1]
    new = tuple([torch.empty_like(x) for x in state[:4]])
    x, a = torch.empty_like(grad), torch.empty_like(grad)
    num_tiles = config.triangle(sides[0]) + config.triangle(sides[1])
    norms = squares.new_empty((num_blocks, 2 if row_sum else num_tiles))
    row_sums = norms, norms
    if row_sum:
        row_sums = tuple([squares.new_empty((num_blocks, config.tiles(n), n)) for n in sides])
    ok = squares.new_empty(num_blocks, dtype=torch.bool)
    products = factors.product_c, factors.product_k
    if products[0] is None or products[0].shape != c.shape or products[1].shape != k.shape:
        products = torch.empty_like(c), torch.empty_like(k)
    return Workspace(config, num_tiles, state, new, x, a, norms, row_sums, products, ok)


def kron_factor_by(
    make_products: MakeProducts,
    factors: Factors,
    gathered: Gathered,
    draws: Draws,
    found_inf: Tensor | None,  # one element
    options: FactorOptions,
) -> Tensor:
    """Update the factors in place and return ok [L]: see `rootfree_kernels.eager.kron_factor`.

    `make_products` is launch 5: `products.make_products`, or another way to compute the same. `gathered` is what this
    backend's `kron_gather` returned. C, K, m_C and m_K have the dtype of G, BF16 (or FP32 in Triton's interpreter).
    """
    grad, squares = gathered
    device, row_sum = grad.device, options.clip == "row_sum"
    num_blocks, p_pad, d_pad = grad.shape
    p, d = factors.factor_c.shape[-1], factors.factor_k.shape[-1]
    packed = factors.momentum_c, factors.momentum_k
    momenta = [as_matrices(m, x) for m, x in zip(packed, factors[:2], strict=True)]
    work = _workspace(factors, momenta, gathered, row_sum)
    config = work.config
    c, k, m_c, m_k, lo_c, lo_k = work.state
    new_c, new_k, new_m_c, new_m_k = work.new
    bits = random_bits(draws, device)

    torch.bmm(c.mT, grad, out=work.x)
    torch.bmm(work.x, k, out=work.a)
    sizes = (p, d, p_pad // PADDING, d_pad // PADDING)
    scalars = options.batch_size, options.riemannian_momentum, options.damping, options.gamma
    launch(
        kron_momentum_kernel,
        num_blocks * work.num_tiles,
        (work.a, c, k, m_c, m_k, new_m_c, new_m_k, squares, work.norms, *work.row_sums),
        (num_blocks, squares.shape[-1], *sizes, *map(float, scalars)),
        (config.block, config.depth, row_sum),
        config.num_warps,
        config.num_stages,
        config.max_registers,
    )
    if row_sum:
        make_norms(*work.row_sums, work.norms, config.block)
    launch(
        kron_factor_kernel,
        num_blocks * (config.tiles(p_pad) ** 2 + config.tiles(d_pad) ** 2),
        (
            *(c, k, new_m_c, new_m_k, new_c, new_k, m_c, m_k),
            *((new_c, new_k) if lo_c is None else (lo_c, lo_k)),
            *(work.norms, bits.seeds, bits.steps, on_device(device, found_inf, 0.0), work.ok),
        ),
        (bits.stride, bits.step_stride, *sizes, bits.step, float(options.beta2), int(options.clip != "none")),
        (config.block, config.depth, row_sum, effective_rounding(c.dtype, options.rounding)),
        config.num_warps,
        config.num_stages,
    )
    make_products(new_c, new_k, *work.products, kept=(c, k))
    _write_back(factors, momenta, work)
    return work.ok


def _write_back(factors: Factors, momenta: list[Tensor], work: Workspace) -> None:
    """Copy what was padded or unpacked back to the state, and tell autograd what was changed."""
    kept = (*factors[:2], *momenta, *factors[4:])
    for x, worked in zip(kept, (*work.state, *work.products), strict=True):
        if x is not None and x is not worked:
            n = x.shape[-1]
            x.copy_(worked[:, :n, :n])
    put_back(momenta[0], factors.momentum_c)
    put_back(momenta[1], factors.momentum_k)
    torch.autograd.graph.increment_version([x for x in kept if x is not None])


kron_factor = partial(kron_factor_by, make_products)
