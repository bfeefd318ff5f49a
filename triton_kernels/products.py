"""Tiles of matrix products, FP32 accumulators of BF16 operands, and the symmetric products P_C = CCᵀ, P_K = KKᵀ.

Both sides of a batch share a launch: the tiles of the p × p products come first, those of the d × d ones behind. Of a
symmetric result only the tiles of the lower triangle are computed; the others are mirrored from the rounded tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rootfree_kernels.triton_kernels.common import dot, round_nearest, triangle_tile
from rootfree_kernels.triton_kernels.configuration import Configuration
from rootfree_kernels.triton_kernels.launch import kernel, launch
from rootfree_kernels.triton_kernels.sizes import PADDING, padded


class TileConfig(NamedTuple):
    """How a matrix kernel is cut up."""

    block: int  # rows and columns of a tile of the result
    depth: int  # of a step of the inner product
    num_warps: int
    num_stages: int
    max_registers: int | None

    def tiles(self, size: int) -> int:
        return -(-size // self.block)

    def triangle(self, size: int) -> int:
        """Tiles of the lower triangle, diagonal included."""
        return self.tiles(size) * (self.tiles(size) + 1) // 2


SMALL, LARGE = TileConfig(64, 64, 4, 3, None), TileConfig(128, 64, 8, 3, 128)
TILE_CONFIGS = (SMALL, LARGE)


def tile_config(rows: int, cols: int) -> TileConfig:
    return SMALL if max(rows, cols) <= SMALL.block else LARGE


@triton.jit
def product_nn(a_ptr, b_ptr, row, col, m, n, depth, acc, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """acc + the tile at (row, col) of A·B, A [m, depth] and B [depth, n], contiguous."""
    i, j, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    a_ptrs = a_ptr + row.to(tl.int64) * depth + (i[:, None] * depth + k[None, :])
    b_ptrs = b_ptr + col + (k[:, None] * n + j[None, :])
    for start in range(0, depth, DEPTH):
        a = tl.load(a_ptrs, mask=(i[:, None] < m - row) & (k[None, :] < depth - start), other=0.0)
        b = tl.load(b_ptrs, mask=(k[:, None] < depth - start) & (j[None, :] < n - col), other=0.0)
        acc = dot(a, b, acc)
        a_ptrs += DEPTH
        b_ptrs += DEPTH * n
    return acc


@triton.jit
def product_nt(x_ptr, row, col, n, depth, acc, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """acc + the tile at (row, col) of XXᵀ, X [n, depth], contiguous."""
    i, j, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    a_ptrs = x_ptr + row.to(tl.int64) * depth + (i[:, None] * depth + k[None, :])
    b_ptrs = x_ptr + col.to(tl.int64) * depth + (j[:, None] * depth + k[None, :])
    for start in range(0, depth, DEPTH):
        a = tl.load(a_ptrs, mask=(i[:, None] < n - row) & (k[None, :] < depth - start), other=0.0)
        b = tl.load(b_ptrs, mask=(j[:, None] < n - col) & (k[None, :] < depth - start), other=0.0)
        acc = dot(a, tl.trans(b), acc)
        a_ptrs += DEPTH
        b_ptrs += DEPTH
    return acc


@triton.jit
def product_tn(x_ptr, row, col, n, depth, acc, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """acc + the tile at (row, col) of XᵀX, X [depth, n], contiguous."""
    i, j, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    a_ptrs = x_ptr + row + (k[:, None] * n + i[None, :])
    b_ptrs = x_ptr + col + (k[:, None] * n + j[None, :])
    for start in range(0, depth, DEPTH):
        a = tl.load(a_ptrs, mask=(k[:, None] < depth - start) & (i[None, :] < n - row), other=0.0)
        b = tl.load(b_ptrs, mask=(k[:, None] < depth - start) & (j[None, :] < n - col), other=0.0)
        acc = dot(tl.trans(a), b, acc)
        a_ptrs += DEPTH * n
        b_ptrs += DEPTH * n
    return acc


@triton.jit
def _halves(x):
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def quarter(x, number: tl.constexpr):
    """A quarter of a tile's columns: an epilogue that takes one after the other needs far fewer registers."""
    left, right = _halves(x)
    first, second = _halves(left if number < 2 else right)
    return first if number % 2 == 0 else second


@triton.jit
def part_of_columns(x, number: tl.constexpr, PARTS: tl.constexpr):
    """Return one of PARTS equal parts of a tile's columns, PARTS being 4 or 8."""
    if PARTS == 4:
        part = quarter(x, number)
    else:
        first, second = _halves(quarter(x, number // 2))
        part = first if number % 2 == 0 else second
    return part


@triton.jit
def part_of_tile(row, col, n, part: tl.constexpr, BLOCK: tl.constexpr):
    """(offset of the tile at (row, col) of an n × n matrix, i, j, offsets of the part's numbers within it, mask)."""
    i, j = tl.arange(0, BLOCK)[:, None], part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    # 64 bits for the tile's place alone: within a tile 32 are enough, and take half the registers.
    return row.to(tl.int64) * n + col, i, j, i * n + j, (i < n - row) & (j < n - col)


@triton.jit
def store_symmetric(value, out_ptr, row, col, n, part: tl.constexpr, BLOCK: tl.constexpr):
    """Store a quarter of a tile of the lower triangle and its mirror image: symmetric to the bit."""
    tile, i, j, offsets, mask = part_of_tile(row, col, n, part, BLOCK)
    mirror = out_ptr + (col.to(tl.int64) * n + row) + tl.trans(j * n + i)
    if row != col:
        tl.store(out_ptr + tile + offsets, value, mask=mask)
        tl.store(mirror, tl.trans(value), mask=tl.trans(mask))
    else:  # the tile on the diagonal is its own mirror image
        tl.store(out_ptr + tile + offsets, value, mask=mask & (i >= j))
        tl.store(mirror, tl.trans(value), mask=tl.trans(mask & (i > j)))


@triton.jit
def copy_part(from_ptr, to_ptr, row, col, n, part: tl.constexpr, BLOCK: tl.constexpr):
    tile, _, _, offsets, mask = part_of_tile(row, col, n, part, BLOCK)
    tl.store(to_ptr + tile + offsets, tl.load(from_ptr + tile + offsets, mask=mask), mask=mask)


@triton.jit
def side_and_tile(p, d, BLOCK: tl.constexpr):
    """(block, whether the side is C's, tile) of this program, where tiles of a triangle of each side share a launch."""
    tiles_p, tiles_d = tl.cdiv(p, BLOCK), tl.cdiv(d, BLOCK)
    triangle_p, triangle_d = tiles_p * (tiles_p + 1) // 2, tiles_d * (tiles_d + 1) // 2
    block = (tl.program_id(0) // (triangle_p + triangle_d)).to(tl.int64)
    t = tl.program_id(0) % (triangle_p + triangle_d)
    is_c = t < triangle_p
    return block, is_c, tl.where(is_c, t, t - triangle_p)


@kernel
def kron_products_kernel(
    c_ptr,
    k_ptr,
    product_c_ptr,
    product_k_ptr,
    kept_c_ptr,
    kept_k_ptr,
    p8,
    d8,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    COMMIT: tl.constexpr,
):
    block, is_c, t = side_and_tile(p8 * 8, d8 * 8, BLOCK)
    n = tl.where(is_c, p8, d8) * 8
    start = block * n * n
    x_ptr = tl.where(is_c, c_ptr, k_ptr) + start  # a branch with a loop in either arm would take twice the memory
    i, j = triangle_tile(t)
    row, col = i * BLOCK, j * BLOCK
    acc = product_nt(x_ptr, row, col, n, n, tl.zeros((BLOCK, BLOCK), dtype=tl.float32), BLOCK, DEPTH)
    out_ptr = tl.where(is_c, product_c_ptr, product_k_ptr) + start
    kept_ptr = tl.where(is_c, kept_c_ptr, kept_k_ptr) + start
    for part in tl.static_range(4):
        value = round_nearest(quarter(acc, part), out_ptr.dtype.element_ty)
        store_symmetric(value, out_ptr, row, col, n, part, BLOCK)
        if COMMIT:
            copy_part(x_ptr, kept_ptr, row, col, n, part, BLOCK)
            if row != col:
                copy_part(x_ptr, kept_ptr, col, row, n, part, BLOCK)


def configurations() -> Iterator[Configuration]:
    for config in TILE_CONFIGS:
        for commit in (True, False):
            yield Configuration(
                kron_products_kernel,
                ("*bf16",) * 6 + ("i32",) * 2,
                (config.block, config.depth, commit),
                config.num_warps,
                config.num_stages,
                kind="matrix",
                max_registers=config.max_registers,
            )


MakeProducts = Callable[[Tensor, Tensor, Tensor, Tensor, "tuple[Tensor, Tensor] | None"], None]


def make_products(c: Tensor, k: Tensor, product_c: Tensor, product_k: Tensor, kept: tuple[Tensor, Tensor] | None):
    """P_C = CCᵀ and P_K = KKᵀ, all [L, n, n] with n a multiple of 8; C and K are copied to `kept` on the way."""
    p, d = c.shape[-1], k.shape[-1]
    config = tile_config(p, d)
    launch(
        kron_products_kernel,
        c.shape[0] * (config.triangle(p) + config.triangle(d)),
        (c, k, product_c, product_k, *(kept or (c, k))),
        (p // PADDING, d // PADDING),
        (config.block, config.depth, kept is not None),
        config.num_warps,
        config.num_stages,
        config.max_registers,
    )


def products_by_bmm(c: Tensor, k: Tensor, product_c: Tensor, product_k: Tensor, kept: tuple[Tensor, Tensor] | None):
    """The same by `torch.bmm`: twice the multiplications, which cuBLAS may do in less time. What is symmetric to the
    bit above is so but for roundings here; nothing that reads P_C and P_K counts on it.

    The products come first, and then C and K are copied to `kept`, which until then is as it was before.
    """
    torch.bmm(c, c.mT, out=product_c)
    torch.bmm(k, k.mT, out=product_k)
    if kept is not None:
        torch._foreach_copy_(list(kept), [c, k])


def pad(x: Tensor, rows: int, cols: int) -> Tensor:
    """Return `x` [L, p, d], or a copy [L, rows, cols] filled up with zeros, contiguous and beginning on 16 bytes."""
    if x.shape[1:] == (rows, cols):
        return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    return torch.nn.functional.pad(x, (0, cols - x.shape[2], 0, rows - x.shape[1]))


def pad_square(x: Tensor) -> Tensor:
    """Return `x` [L, n, n] with n filled up to a multiple of 8, likewise."""
    if x.shape[-1] % PADDING == 0 and x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return pad(x, padded(x.shape[1]), padded(x.shape[2]))


def kron_products_by(
    make_products: MakeProducts, factor_c: Tensor, factor_k: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `rootfree_kernels.eager.kron_products`."""
    c, k = pad_square(factor_c.to(dtype)), pad_square(factor_k.to(dtype))
    product_c, product_k = torch.empty_like(c), torch.empty_like(k)
    make_products(c, k, product_c, product_k, None)
    p, d = factor_c.shape[-1], factor_k.shape[-1]
    return product_c[:, :p, :p].contiguous(), product_k[:, :d, :d].contiguous()


kron_products = partial(kron_products_by, make_products)
