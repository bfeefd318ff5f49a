"""One update of the Kronecker factors of a batch of blocks (Lin et al., ICML 2024, Fig. 5 right and Fig. 7).

It takes five launches for any number of blocks. Launches 3 to 5 compute m_K, K' and P_K as well:

    1, 2  A = CᵀGK                                                                              cuBLAS, batched
    3     m' = α₂m + (1−α₂)Δ,  Δ = ½[(B/d)·AAᵀ + (λ/d)·‖K‖²_F·CᵀC − γI],  and ‖m'‖
    4     C' = C − β₂/max(1, ‖m'‖)·C·m',  m ← m'
    5     P_C = C'C'ᵀ,  C ← C'

With `clip="row_sum"`, a small launch between 3 and 4 computes ‖m'‖ from partial row sums (see `kron_norms`).

A curvature, or the whitened direction, takes a small launch first (see `kron_start`). For the whitened direction the
damping of 3 is ½√λ·(tr K/d)·C, which takes no product. In the place of 4 and 5,

    4     C' = C − ½β₂/max(1, ‖m'‖)·(C·m' + m'·C),  m ← m'                                      see `kron_whiten`
    5     C ← C'                                                                                torch._foreach_copy_

m' and C' wait in temporary memory until it is known whether the block is finite on both sides, so that only finite
values enter the state. No launch depends on the order in which programs run, so results repeat bitwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from rootfree_kernels.arguments import Draws, FactorOptions, Factors, Gathered
from rootfree_kernels.packing import as_matrices
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
from rootfree_kernels.triton_kernels.factor_workspace import allocate, write_back
from rootfree_kernels.triton_kernels.kron_norms import both_norms, make_norms
from rootfree_kernels.triton_kernels.kron_start import commit_block, make_start
from rootfree_kernels.triton_kernels.kron_whiten import move_whitened
from rootfree_kernels.triton_kernels.launch import kernel, launch
from rootfree_kernels.triton_kernels.products import (
    TILE_CONFIGS,
    MakeProducts,
    make_products,
    part_of_tile,
    product_nn,
    product_nt,
    product_tn,
    quarter,
    side_and_tile,
    store_symmetric,
)
from rootfree_kernels.triton_kernels.sizes import PADDING

_SLOT_C, _SLOT_K = tl.constexpr(SLOT_FACTOR_C), tl.constexpr(SLOT_FACTOR_K)


@kernel
def kron_momentum_kernel(
    a_ptr,  # A [L, p8*8, d8*8], BF16
    c_ptr,  # C [L, p8*8, p8*8], BF16
    k_ptr,  # K [L, d8*8, d8*8], BF16
    m_c_ptr,  # m_C and m_K, as C and K
    m_k_ptr,
    new_m_c_ptr,  # m' of both sides, as C and K: written
    new_m_k_ptr,
    squares_ptr,  # [1 or 3, L, num_parts], FP32: sums of squares of G, C and K
    norms_ptr,  # [L, tiles of both sides], FP32: sums of squares of m', written unless ROW_SUM
    row_sums_c_ptr,  # [L, tiles, p8*8], FP32: partial row sums of m', written if ROW_SUM
    row_sums_k_ptr,  # [L, tiles, d8*8], FP32
    weights_ptr,  # [L, 4], FP32: what `kron_start_kernel` wrote, or a stand-in
    num_blocks,  # L
    num_parts,  # partial sums of a block
    is_weighted,  # 0 or 1: whether damping and γ come from there
    p,  # sides without padding
    d,
    p8,  # padded sides / 8: from p8 * 8 the compiler sees that every row begins on 16 bytes
    d8,
    batch_size,  # B
    alpha2,  # α₂
    damping,  # λ
    gamma,  # γ
    BLOCK: tl.constexpr,  # rows and columns of a tile
    DEPTH: tl.constexpr,  # of a step of the inner product
    ROW_SUM: tl.constexpr,  # whether the norm is the largest row sum
    WHITENED: tl.constexpr,  # whether the damping is that of the whitened direction
):
    """Write m' and partial sums of its norm. A program computes one tile of the lower triangle of one side."""
    block, is_c, t = side_and_tile(p8 * 8, d8 * 8, BLOCK)
    n = tl.where(is_c, p8, d8) * 8
    inner = tl.where(is_c, d8, p8) * 8
    start = block * n * n
    i, j = triangle_tile(t)
    row, col = i * BLOCK, j * BLOCK

    # First λ·‖K‖²_F·CᵀC, divided by B, since the sum is multiplied by B/(2d) below. No product if λ is 0.
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    x_ptr = tl.where(is_c, c_ptr, k_ptr) + start
    weights_ptr += 4 * block * is_weighted
    weight = tl.load(weights_ptr + tl.where(is_c, 0, 1) * is_weighted)
    half_gamma = tl.where(is_weighted != 0, tl.load(weights_ptr + 2 * is_weighted), 0.5 * gamma)
    if not WHITENED:
        acc = product_tn(x_ptr, row, col, n, tl.where(damping > 0.0, n, 0), acc, BLOCK, DEPTH)
        side = tl.where(is_c, 2, 1)  # where the other factor's squares are
        parts_ptr = squares_ptr + (side * num_blocks + block) * num_parts
        num_parts = tl.where((damping > 0.0) & (is_weighted == 0), num_parts, 0)
        from_parts = damping / batch_size * sum_of_parts(parts_ptr, num_parts)
        acc *= tl.where(is_weighted != 0, weight / batch_size, from_parts)

    # Then AAᵀ or AᵀA: one of the loops runs zero times. With a branch, each loop would take shared memory of its own.
    a_ptr += block * n * inner
    acc = product_nt(a_ptr, row, col, n, tl.where(is_c, inner, 0), acc, BLOCK, DEPTH)
    acc = product_tn(a_ptr, row, col, n, tl.where(is_c, 0, inner), acc, BLOCK, DEPTH)

    m_ptr = tl.where(is_c, m_c_ptr, m_k_ptr) + start
    new_m_ptr = tl.where(is_c, new_m_c_ptr, new_m_k_ptr) + start
    scale = batch_size / (2.0 * tl.where(is_c, d, p))
    size = tl.where(is_c, p, d)  # without padding
    tiles, index = tl.cdiv(n, BLOCK), tl.arange(0, BLOCK)
    sums_ptr = tl.where(is_c, row_sums_c_ptr, row_sums_k_ptr) + block * tiles * n
    # The branches on `whole` and on the diagonal save registers. Without them Triton 3.6 converts m between layouts
    # twice, in FP32, and spills registers on sm_90.
    whole = (row + BLOCK <= n) & (col + BLOCK <= n)
    square, row_sum = 0.0, tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(4):
        tile, a, b, offsets, mask = part_of_tile(row, col, n, part, BLOCK)
        on_diagonal = (row + a == col + b) & (row + a < size)
        delta = quarter(acc, part) * scale
        if i == j:
            delta -= tl.where(on_diagonal, half_gamma, 0.0)
        if WHITENED:
            if whole:
                c = tl.load(x_ptr + tile + offsets).to(tl.float32)
            else:
                c = tl.load(x_ptr + tile + offsets, mask=mask, other=0.0).to(tl.float32)
            delta += 0.5 * weight * c
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
    c_ptr,  # C [L, p8*8, p8*8], BF16
    k_ptr,  # K [L, d8*8, d8*8], BF16
    new_m_c_ptr,  # m' of both sides, as C and K
    new_m_k_ptr,
    new_c_ptr,  # C' and K', as C and K: written
    new_k_ptr,
    m_c_ptr,  # m_C and m_K, as C and K: written
    m_k_ptr,
    residual_c_ptr,  # int16, as C and K: updated if ROUNDING is "compensated", otherwise unused
    residual_k_ptr,
    norms_ptr,  # [L, 2] if ROW_SUM, otherwise [L, tiles of both sides], FP32: see `both_norms`
    weights_ptr,  # [L, 4], FP32: what `kron_start_kernel` wrote, or a stand-in
    curvature_ptr,  # q [L], FP32: written, or one element
    seeds_ptr,  # [L] or one element, int32
    steps_ptr,  # [L] or one element, int64: added to `step_value`
    found_inf_ptr,  # one element, FP32
    ok_ptr,  # [L], bool: written
    seed_stride,  # 0 if no bits are drawn
    step_stride,  # 0 if all blocks have the same step
    p,  # sides without padding
    d,
    p8,  # padded sides / 8
    d8,
    follows,  # 0 or 1: whether there is a curvature
    step_value,  # int32
    beta2,  # β₂
    clipped,  # 0 or 1: whether the step is divided by max(1, ‖m'‖)
    BLOCK: tl.constexpr,  # rows and columns of a tile
    DEPTH: tl.constexpr,  # of a step of the inner product
    ROW_SUM: tl.constexpr,  # whether the norm is the largest row sum
    ROUNDING: tl.constexpr,  # of C and K
):
    """Write C', K', q and `ok`, and m ← m' of finite blocks. A program computes one tile of one side."""
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
        commit_block(ok, block, ok_ptr, curvature_ptr, weights_ptr, follows)

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


# ---- configuration -----------------------------------------------------------------------------------------------


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that `kron_factor` can launch."""
    for config in TILE_CONFIGS:
        block, depth, num_warps, num_stages, max_registers = config
        for row_sum in (False, True):
            for whitened in (False, True):
                yield Configuration(
                    kron_momentum_kernel,
                    (*("*bf16",) * 7, *("*fp32",) * 5, *("i32",) * 7, *("fp32",) * 4),
                    (block, depth, row_sum, whitened),
                    num_warps,
                    num_stages,
                    kind="matrix",
                    max_registers=max_registers,
                )
            for rounding in ("stochastic", "compensated", "nearest"):
                yield Configuration(
                    kron_factor_kernel,
                    (
                        *(*("*bf16",) * 8, "*i16", "*i16", *("*fp32",) * 3),
                        *("*i32", "*i64", "*fp32", "*i1", *("i32",) * 8, "fp32", "i32"),
                    ),
                    (block, depth, row_sum, rounding),
                    num_warps,
                    num_stages,
                    kind="matrix",
                )


# ---- launcher ----------------------------------------------------------------------------------------------------


def kron_factor_by(
    make_products: MakeProducts,
    factors: Factors,
    gathered: Gathered,
    draws: Draws,
    found_inf: Tensor | None,  # one element
    options: FactorOptions,
) -> Tensor:
    """Update as `kron_factor` does, with P_C and P_K from `make_products` or a function with its signature."""
    grad, squares = gathered
    device, row_sum, is_whitened = grad.device, options.clip == "row_sum", options.direction == "whitened"
    num_blocks, p_pad, d_pad = grad.shape
    p, d = factors.factor_c.shape[-1], factors.factor_k.shape[-1]
    momenta = as_matrices(factors.momentum_c, factors.factor_c), as_matrices(factors.momentum_k, factors.factor_k)
    work = allocate(factors, momenta, gathered, row_sum, is_whitened)
    config, (c, k) = work.config, work.factors
    bits = random_bits(draws, device)

    if work.is_weighted:
        make_start(work, squares, (p, d), found_inf, options)
    torch.bmm(c.mT, grad, out=work.x)
    torch.bmm(work.x, k, out=work.a)
    sizes = (p, d, p_pad // PADDING, d_pad // PADDING)
    scalars = options.batch_size, options.riemannian_momentum, options.damping, options.gamma
    launch(
        kron_momentum_kernel,
        num_blocks * work.num_tiles,
        (work.a, c, k, *work.momenta, *work.new_momenta, squares, work.norms, *work.row_sums, work.weights),
        (num_blocks, squares.shape[-1], int(work.is_weighted), *sizes, *map(float, scalars)),
        (config.block, config.depth, row_sum, is_whitened),
        config.num_warps,
        config.num_stages,
        config.max_registers,
    )
    if row_sum:
        make_norms(*work.row_sums, work.norms, config.block)
    if work.products is None:
        move_whitened(work, (p, d), bits, found_inf, options)
    else:
        launch(
            kron_factor_kernel,
            num_blocks * (config.tiles(p_pad) ** 2 + config.tiles(d_pad) ** 2),
            (
                *(c, k, *work.new_momenta, *work.new_factors, *work.momenta),
                *(work.residuals or work.new_factors),  # the kernel takes residuals, but reads only those that exist
                *(work.norms, work.weights, work.weights if work.curvature is None else work.curvature),
                *(bits.seeds, bits.steps, on_device(device, found_inf, 0.0), work.ok),
            ),
            (
                *(bits.stride, bits.step_stride, *sizes, int(work.curvature is not None)),
                *(bits.step, float(options.beta2), int(options.clip != "none")),
            ),
            (config.block, config.depth, row_sum, effective_rounding(c.dtype, options.rounding)),
            config.num_warps,
            config.num_stages,
        )
        make_products(*work.new_factors, *work.products, kept=(c, k))
    write_back(factors, momenta, work)
    return work.ok


def kron_factor(
    factors: Factors,
    gathered: Gathered,
    draws: Draws,
    found_inf: Tensor | None,  # one element
    options: FactorOptions,
) -> Tensor:
    """Update the factors in place and return ok [L], bool: see `rootfree_kernels.eager.kron_factor`.

    `gathered` is the result of this backend's `kron_gather`, including the squares of C and K if λ is not 0, unless the
    direction is whitened. q is FP32, and C and K of the whitened direction are bitwise symmetric. G is not
    changed. C, K, m_C and m_K have the dtype of G: BF16, or FP32 in Triton's interpreter.
    """
    return kron_factor_by(make_products, factors, gathered, draws, found_inf, options)
