"""The step of the factors of the whitened direction, which keeps them symmetric.

    C' = C − ½β₂/max(1, ‖m'‖)·(C·m' + m'·C),    m ← m'

Only tiles of the lower triangle are computed. Each of them is rounded once and stored to its place and to its mirror
image, so that C' is bitwise symmetric, whatever the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rootfree_kernels.arguments import FactorOptions
from rootfree_kernels.pointer_tables.tables import RandomBits, on_device
from rootfree_kernels.rounding import SLOT_FACTOR_C, SLOT_FACTOR_K
from rootfree_kernels.triton_kernels.common import (
    dot,
    effective_rounding,
    is_finite,
    load_stored,
    random_bits,
    random_key,
    round_nearest,
    round_stochastic,
    split_compensated,
    triangle_tile,
)
from rootfree_kernels.triton_kernels.configuration import Configuration
from rootfree_kernels.triton_kernels.factor_workspace import FactorWorkspace
from rootfree_kernels.triton_kernels.kron_norms import both_norms
from rootfree_kernels.triton_kernels.kron_start import commit_block
from rootfree_kernels.triton_kernels.launch import kernel, launch
from rootfree_kernels.triton_kernels.products import (
    TILE_CONFIGS,
    copy_part,
    part_of_tile,
    quarter,
    side_and_tile,
    store_symmetric,
)
from rootfree_kernels.triton_kernels.sizes import PADDING

_SLOT_C, _SLOT_K = tl.constexpr(SLOT_FACTOR_C), tl.constexpr(SLOT_FACTOR_K)


@triton.jit
def store_rounded_symmetric(
    x, value_ptr, residual_ptr, row, col, n, key, index, part: tl.constexpr, BLOCK: tl.constexpr, ROUNDING: tl.constexpr
):
    """Round a quarter of a tile of the lower triangle as `store_rounded` does, and store it as `store_symmetric`."""
    if ROUNDING == "compensated":
        hi, lo = split_compensated(x)
        store_symmetric(hi, value_ptr, row, col, n, part, BLOCK)
        store_symmetric(lo, residual_ptr, row, col, n, part, BLOCK)
    elif ROUNDING == "stochastic":
        store_symmetric(round_stochastic(x, random_bits(key, index)), value_ptr, row, col, n, part, BLOCK)
    else:
        store_symmetric(round_nearest(x, value_ptr.dtype.element_ty), value_ptr, row, col, n, part, BLOCK)


@triton.jit
def product_both_ways(x_ptr, y_ptr, row, col, n, acc, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Return acc + the tile at (row, col) of X·Y + Y·X, with contiguous X and Y [n, n].

    Both products share a loop. With one for each, more than 128 registers would be live.
    """
    i, j, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    steps = tl.cdiv(n, DEPTH)
    for step in range(0, 2 * steps):
        is_first = step < steps
        start = tl.where(is_first, step, step - steps) * DEPTH
        a_ptr, b_ptr = tl.where(is_first, x_ptr, y_ptr), tl.where(is_first, y_ptr, x_ptr)
        a_ptrs = a_ptr + (row.to(tl.int64) * n + start) + (i[:, None] * n + k[None, :])
        b_ptrs = b_ptr + (start.to(tl.int64) * n + col) + (k[:, None] * n + j[None, :])
        a = tl.load(a_ptrs, mask=(i[:, None] < n - row) & (k[None, :] < n - start), other=0.0)
        b = tl.load(b_ptrs, mask=(k[:, None] < n - start) & (j[None, :] < n - col), other=0.0)
        acc = dot(a, b, acc)
    return acc


@kernel
def kron_whiten_kernel(
    c_ptr,  # C [L, p8*8, p8*8], BF16, symmetric
    k_ptr,  # K [L, d8*8, d8*8], BF16, symmetric
    new_m_c_ptr,  # m' of both sides, as C and K, symmetric
    new_m_k_ptr,
    new_c_ptr,  # C' and K', as C and K: written
    new_k_ptr,
    m_c_ptr,  # m_C and m_K, as C and K: written
    m_k_ptr,
    residual_c_ptr,  # int16, as C and K: updated if ROUNDING is "compensated", otherwise unused
    residual_k_ptr,
    norms_ptr,  # [L, 2] if ROW_SUM, otherwise [L, tiles of both sides], FP32: see `both_norms`
    weights_ptr,  # [L, 4], FP32: what `kron_start_kernel` wrote
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
    """Write C', K', q and `ok`, and m ← m' of finite blocks. A program computes one tile of a lower triangle."""
    block, is_c, t = side_and_tile(p8 * 8, d8 * 8, BLOCK)
    n = tl.where(is_c, p8, d8) * 8
    start = block * n * n
    tile_row, tile_col = triangle_tile(t)
    row, col = tile_row * BLOCK, tile_col * BLOCK

    x_ptr = tl.where(is_c, c_ptr, k_ptr) + start
    new_m_ptr = tl.where(is_c, new_m_c_ptr, new_m_k_ptr) + start
    product = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    product = product_both_ways(x_ptr, new_m_ptr, row, col, n, product, BLOCK, DEPTH)

    norm_c, norm_k = both_norms(norms_ptr, block, p8 * 8, d8 * 8, BLOCK, ROW_SUM)
    ok = is_finite(norm_c) & is_finite(norm_k) & (tl.load(found_inf_ptr) == 0.0)
    norm = tl.where(is_c, norm_c, norm_k)
    scale = 0.5 * beta2 / tl.where(clipped != 0, tl.maximum(norm, 1.0), 1.0)
    if is_c & (t == 0):
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
        store_rounded_symmetric(new, new_ptr, residual_ptr, row, col, n, key, index, part, BLOCK, ROUNDING)
        if ok:
            copy_part(new_m_ptr, m_ptr, row, col, n, part, BLOCK)
            if row != col:
                copy_part(new_m_ptr, m_ptr, col, row, n, part, BLOCK)


# ---- configuration -----------------------------------------------------------------------------------------------


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that `move_whitened` can launch."""
    tensors = (*("*bf16",) * 8, "*i16", "*i16", *("*fp32",) * 3, "*i32", "*i64", "*fp32", "*i1")
    for config in TILE_CONFIGS:
        for row_sum in (False, True):
            for rounding in ("stochastic", "compensated", "nearest"):
                yield Configuration(
                    kron_whiten_kernel,
                    (*tensors, *("i32",) * 8, "fp32", "i32"),
                    (config.block, config.depth, row_sum, rounding),
                    config.num_warps,
                    config.num_stages,
                    kind="matrix",  # with 128 registers, Triton 3.6 spills some
                )


# ---- launcher ----------------------------------------------------------------------------------------------------


def move_whitened(
    work: FactorWorkspace,
    sides: tuple[int, int],  # p and d, without padding
    bits: RandomBits,
    found_inf: Tensor | None,  # one element
    options: FactorOptions,
) -> None:
    """Move C and K of a batch, and write m, q and `work.ok`."""
    config, (c, k) = work.config, work.factors
    rounding = effective_rounding(c.dtype, options.rounding)
    p_pad, d_pad = c.shape[-1], k.shape[-1]
    launch(
        kron_whiten_kernel,
        len(c) * work.num_tiles,
        (
            *(c, k, *work.new_momenta, *work.new_factors, *work.momenta),
            *(work.residuals or work.new_factors),  # the kernel takes residuals, but reads them only if there are any
            *(work.norms, work.weights, work.weights if work.curvature is None else work.curvature),
            *(bits.seeds, bits.steps, on_device(c.device, found_inf, 0.0), work.ok),
        ),
        (
            *(bits.stride, bits.step_stride, *sides, p_pad // PADDING, d_pad // PADDING),
            *(int(work.curvature is not None), bits.step, float(options.beta2), int(options.clip != "none")),
        ),
        (config.block, config.depth, options.clip == "row_sum", rounding),
        config.num_warps,
        config.num_stages,
    )
    torch._foreach_copy_([c, k], [*work.new_factors])
