"""The norms ‖m_C‖ and ‖m_K‖ of a batch of blocks, from the partial sums that `kron_momentum_kernel` writes.

    ‖m‖_F = √Σ_ij m_ij²,    or the largest row sum    max_i Σ_j |m_ij|

‖m‖²_F has one partial sum for each tile: 528 a side at n = 4096. Every program of `kron_factor_kernel` adds them, with
one load a side, while the other program on its multiprocessor multiplies. A separate launch would take 2–3 µs.

Row sums have one partial sum for each row and tile: 131,072 a side at n = 4096. Every program of `kron_factor_kernel`
would wait for 256 loads, one after the other. A separate launch reads them once instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from rootfree_kernels.triton_kernels.common import sum_of_parts
from rootfree_kernels.triton_kernels.configuration import Configuration
from rootfree_kernels.triton_kernels.launch import kernel, launch
from rootfree_kernels.triton_kernels.products import TILE_CONFIGS
from rootfree_kernels.triton_kernels.sizes import PADDING

_SUM_TILES, _SUM_ROWS = tl.constexpr(16), tl.constexpr(512)
"""Tiles and rows whose partial sums `largest_row_sum` loads at once."""


@triton.jit
def largest_row_sum(x_ptr, tiles, n):
    """Return the largest of n row sums, from their partial sums x [tiles, n], FP32.

    The result is infinite if a sum is NaN, which tl.max would drop. Partial sums are always added in the same order.
    """
    tile, row = tl.arange(0, _SUM_TILES)[:, None], tl.arange(0, _SUM_ROWS)[None, :]
    largest = tl.zeros((_SUM_ROWS,), dtype=tl.float32)
    for first_row in range(0, n, _SUM_ROWS):
        parts = tl.zeros((_SUM_TILES, _SUM_ROWS), dtype=tl.float32)
        for first_tile in range(0, tiles, _SUM_TILES):
            mask = (first_tile + tile < tiles) & (first_row + row < n)
            parts += tl.load(x_ptr + (first_tile + tile) * n + first_row + row, mask=mask, other=0.0)
        sums = tl.sum(parts, axis=0)
        largest = tl.maximum(largest, tl.where(sums == sums, sums, float("inf")))
    return tl.max(largest)


@kernel
def kron_norms_kernel(
    row_sums_c_ptr,  # [L, tiles, p8*8], FP32
    row_sums_k_ptr,  # [L, tiles, d8*8], FP32
    norms_ptr,  # [L, 2], FP32: written
    p8,  # padded sides / 8
    d8,
    BLOCK: tl.constexpr,  # rows of a tile
):
    """Write the largest row sums of m_C and m_K. A program works on one side of a block."""
    block, is_c = (tl.program_id(0) // 2).to(tl.int64), tl.program_id(0) % 2 == 0
    n = tl.where(is_c, p8, d8) * 8
    tiles = tl.cdiv(n, BLOCK)
    sums_ptr = tl.where(is_c, row_sums_c_ptr, row_sums_k_ptr) + block * tiles * n
    tl.store(norms_ptr + tl.program_id(0), largest_row_sum(sums_ptr, tiles, n))


@triton.jit
def both_norms(norms_ptr, block, p, d, BLOCK: tl.constexpr, ROW_SUM: tl.constexpr):
    """Return ‖m_C‖ and ‖m_K‖ of a block of padded sides p and d.

    `norms_ptr` holds row-sum norms [L, 2] of `kron_norms_kernel` if ROW_SUM, and otherwise the partial sums of squares
    [L, tiles of both sides] of `kron_momentum_kernel`.
    """
    if ROW_SUM:
        norm_c, norm_k = tl.load(norms_ptr + 2 * block), tl.load(norms_ptr + 2 * block + 1)
    else:
        tiles_p, tiles_d = tl.cdiv(p, BLOCK), tl.cdiv(d, BLOCK)
        triangle_p, triangle_d = tiles_p * (tiles_p + 1) // 2, tiles_d * (tiles_d + 1) // 2
        norms_ptr += block * (triangle_p + triangle_d)
        norm_c = tl.sqrt(sum_of_parts(norms_ptr, triangle_p))
        norm_k = tl.sqrt(sum_of_parts(norms_ptr + triangle_p, triangle_d))
    return norm_c, norm_k


# ---- configuration -----------------------------------------------------------------------------------------------

NUM_WARPS = 8
"""Many, since there are few programs, and each reads much."""


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that `make_norms` can launch."""
    for config in TILE_CONFIGS:
        types = ("*fp32", "*fp32", "*fp32", "i32", "i32")
        yield Configuration(kron_norms_kernel, types, (config.block,), NUM_WARPS, 1, kind="irregular")


# ---- launcher ----------------------------------------------------------------------------------------------------


def make_norms(
    row_sums_c: Tensor,  # [L, tiles, padded p], FP32
    row_sums_k: Tensor,  # [L, tiles, padded d], FP32
    norms: Tensor,  # [L, 2], FP32
    block: int,
) -> None:
    """Write the largest row sums of m_C and m_K to `norms`, from partial sums over tiles of `block` columns.

    A norm is infinite if one of its row sums is NaN or infinite.
    """
    sizes = row_sums_c.shape[-1] // PADDING, row_sums_k.shape[-1] // PADDING
    launch(kron_norms_kernel, norms.numel(), (row_sums_c, row_sums_k, norms), sizes, (block,), NUM_WARPS)
