"""‖m_C‖ and ‖m_K‖ of the blocks of a batch, from the parts of them that the tiles of `kron_momentum_kernel` leave:

    ‖m‖_F = √Σ (parts of Σ m²),    or    max_i Σ (parts of Σ_j |m_ij|)

‖m‖²_F has one part a tile, 528 a side at n = 4096. Every program of `kron_factor_kernel` adds them up, with one load a
side, which hides behind the products of the other program on its multiprocessor; a launch of its own would take 2–3 µs.
Row sums have a part a row and tile, 131,072 a side at n = 4096: each of those programs would wait for 256 loads, one
after the other. A launch in between reads them once.
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
"""Parts of `largest_row_sum` that are loaded at once."""


@triton.jit
def largest_row_sum(x_ptr, tiles, n):
    """Return the largest row sum of FP32 x [tiles, n], which holds `tiles` parts of each sum.

    The result is infinite if any sum is NaN, because tl.max drops NaN. Parts are added in the same order every time.
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
def kron_norms_kernel(row_sums_c_ptr, row_sums_k_ptr, norms_ptr, p8, d8, BLOCK: tl.constexpr):
    """Write the largest row sums of m_C and m_K to `norms_ptr` [L, 2]; a program takes one side of a block."""
    block, is_c = (tl.program_id(0) // 2).to(tl.int64), tl.program_id(0) % 2 == 0
    n = tl.where(is_c, p8, d8) * 8
    tiles = tl.cdiv(n, BLOCK)
    sums_ptr = tl.where(is_c, row_sums_c_ptr, row_sums_k_ptr) + block * tiles * n
    tl.store(norms_ptr + tl.program_id(0), largest_row_sum(sums_ptr, tiles, n))


@triton.jit
def both_norms(norms_ptr, block, p, d, BLOCK: tl.constexpr, ROW_SUM: tl.constexpr):
    """Return ‖m_C‖ and ‖m_K‖ of a block, from what `kron_norms_kernel` or else `kron_momentum_kernel` wrote."""
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
"""There are few programs, each of which has much to read."""


def configurations() -> Iterator[Configuration]:
    for config in TILE_CONFIGS:
        types = ("*fp32", "*fp32", "*fp32", "i32", "i32")
        yield Configuration(kron_norms_kernel, types, (config.block,), NUM_WARPS, 1, kind="irregular")


# ---- launcher ----------------------------------------------------------------------------------------------------


def make_norms(row_sums_c: Tensor, row_sums_k: Tensor, norms: Tensor, block: int) -> None:
    """Write the largest row sums of L blocks to `norms` [L, 2], from the parts [L, tiles, n] of tiles of `block` rows.

    All tensors are FP32. A norm is infinite if any of its row sums is NaN or infinite.
    """
    sizes = row_sums_c.shape[-1] // PADDING, row_sums_k.shape[-1] // PADDING
    launch(kron_norms_kernel, norms.numel(), (row_sums_c, row_sums_k, norms), sizes, (block,), NUM_WARPS)
