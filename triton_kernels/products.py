"""Tiles of matrix products, and the symmetric products of the factors.

    P_C = CCᵀ,    P_K = KKᵀ

Operands are BF16, accumulators FP32. Both sides of a batch share a launch: in every block, the tiles of the p × p
product come before those of the d × d product. Of a symmetric product only the tiles of the lower triangle are
computed. The other tiles are copies of their mirror images, after rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from rootfree_kernels.triton_kernels.common import dot, round_nearest, triangle_tile
from rootfree_kernels.triton_kernels.configuration import Configuration
from rootfree_kernels.triton_kernels.launch import kernel, launch
from rootfree_kernels.triton_kernels.sizes import PADDING, padded


class TileConfig(NamedTuple):
    """Tile sizes and launch options of a matrix kernel."""

    block: int  # rows and columns of a tile of the result
    depth: int  # columns of A and rows of B that are multiplied at a time
    num_warps: int
    num_stages: int
    max_registers: int | None  # see `Configuration`

    def tiles(self, size: int) -> int:
        """Return the tiles along a side of `size`."""
        return -(-size // self.block)

    def triangle(self, size: int) -> int:
        """Return the tiles of the lower triangle of a square of `size`, with those on the diagonal."""
        return self.tiles(size) * (self.tiles(size) + 1) // 2


SMALL, LARGE = TileConfig(64, 64, 4, 3, None), TileConfig(128, 64, 8, 3, 128)
TILE_CONFIGS = (SMALL, LARGE)


def tile_config(rows: int, cols: int) -> TileConfig:
    """Return the configuration for blocks of rows × cols."""
    return SMALL if max(rows, cols) <= SMALL.block else LARGE


@triton.jit
def product_nn(a_ptr, b_ptr, row, col, m, n, depth, acc, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Return acc + the tile at (row, col) of A·B, with contiguous A [m, depth] and B [depth, n]."""
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
    """Return acc + the tile at (row, col) of XXᵀ, with contiguous X [n, depth]."""
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
    """Return acc + the tile at (row, col) of XᵀX, with contiguous X [depth, n]."""
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
    """Return the left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def quarter(x, number: tl.constexpr):
    """Return a quarter of a tile's columns. An epilogue that works on one at a time needs far fewer registers."""
    left, right = _halves(x)
    first, second = _halves(left if number < 2 else right)
    return first if number % 2 == 0 else second


@triton.jit
def part_of_columns(x, number: tl.constexpr, PARTS: tl.constexpr):
    """Return one of PARTS equal parts of a tile's columns. PARTS is 4 or 8."""
    if PARTS == 4:
        part = quarter(x, number)
    else:
        first, second = _halves(quarter(x, number // 2))
        part = first if number % 2 == 0 else second
    return part


@triton.jit
def part_of_tile(row, col, n, part: tl.constexpr, BLOCK: tl.constexpr):
    """Return where a quarter of the columns of the tile at (row, col) of an n × n matrix lies.

    Returns:
        (offset of the tile in the matrix, i, j, offsets within the tile, mask). i and j are row and column in the tile.
    """
    i, j = tl.arange(0, BLOCK)[:, None], part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    # Only the offset of the tile needs 64 bits. Offsets within a tile fit 32 bits, which take half of the registers.
    return row.to(tl.int64) * n + col, i, j, i * n + j, (i < n - row) & (j < n - col)


@triton.jit
def store_symmetric(value, out_ptr, row, col, n, part: tl.constexpr, BLOCK: tl.constexpr):
    """Store a quarter of a tile of the lower triangle and its mirror image, so that the matrix is bitwise symmetric."""
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
    """Copy a quarter of the tile at (row, col) from one n × n matrix to another."""
    tile, _, _, offsets, mask = part_of_tile(row, col, n, part, BLOCK)
    tl.store(to_ptr + tile + offsets, tl.load(from_ptr + tile + offsets, mask=mask), mask=mask)


@triton.jit
def side_and_tile(p, d, BLOCK: tl.constexpr):
    """Return (block, whether this is the side of C, tile) of this program, in a launch over the triangles of all sides.

    p and d are the padded sides.
    """
    tiles_p, tiles_d = tl.cdiv(p, BLOCK), tl.cdiv(d, BLOCK)
    triangle_p, triangle_d = tiles_p * (tiles_p + 1) // 2, tiles_d * (tiles_d + 1) // 2
    block = (tl.program_id(0) // (triangle_p + triangle_d)).to(tl.int64)
    t = tl.program_id(0) % (triangle_p + triangle_d)
    is_c = t < triangle_p
    return block, is_c, tl.where(is_c, t, t - triangle_p)


@kernel
def kron_products_kernel(
    c_ptr,  # C [L, p8*8, p8*8], BF16
    k_ptr,  # K [L, d8*8, d8*8], BF16
    product_c_ptr,  # P_C [L, p8*8, p8*8], BF16: written
    product_k_ptr,  # P_K [L, d8*8, d8*8], BF16: written
    kept_c_ptr,  # [L, p8*8, p8*8], BF16: C is copied to it if COMMIT
    kept_k_ptr,  # [L, d8*8, d8*8], BF16: K is copied to it if COMMIT
    p8,  # padded sides / 8: from p8 * 8 the compiler sees that every row begins on 16 bytes
    d8,
    BLOCK: tl.constexpr,  # rows and columns of a tile
    DEPTH: tl.constexpr,  # of a step of the inner product
    COMMIT: tl.constexpr,
):
    """Write P_C = CCᵀ and P_K = KKᵀ. A program computes one tile of a lower triangle."""
    block, is_c, t = side_and_tile(p8 * 8, d8 * 8, BLOCK)
    n = tl.where(is_c, p8, d8) * 8
    start = block * n * n
    x_ptr = tl.where(is_c, c_ptr, k_ptr) + start  # not a branch: loops in both arms would take twice the shared memory
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


# ---- configuration -----------------------------------------------------------------------------------------------


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that `make_products` can launch."""
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


# ---- launcher ----------------------------------------------------------------------------------------------------


class MakeProducts(Protocol):
    """The signature of `make_products` and of `products_by_bmm`."""

    def __call__(
        self, c: Tensor, k: Tensor, product_c: Tensor, product_k: Tensor, kept: tuple[Tensor, Tensor] | None
    ) -> None: ...


def make_products(
    c: Tensor,  # C [L, p, p], BF16; p and d are multiples of 8, all tensors are contiguous
    k: Tensor,  # K [L, d, d], BF16
    product_c: Tensor,  # P_C [L, p, p], BF16
    product_k: Tensor,  # P_K [L, d, d], BF16
    kept: tuple[Tensor, Tensor] | None,  # [L, p, p] and [L, d, d], BF16
) -> None:
    """Write P_C = CCᵀ and P_K = KKᵀ, which are bitwise symmetric. Copy C and K to `kept` in the same launch."""
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


def products_by_bmm(
    c: Tensor, k: Tensor, product_c: Tensor, product_k: Tensor, kept: tuple[Tensor, Tensor] | None
) -> None:
    """Write the same products with `torch.bmm`: twice the multiplications, which cuBLAS may do in less time.

    The products are symmetric only up to rounding. Nothing that reads them relies on more. `kept` stays unchanged until
    both products are computed.
    """
    torch.bmm(c, c.mT, out=product_c)
    torch.bmm(k, k.mT, out=product_k)
    if kept is not None:
        torch._foreach_copy_(list(kept), [c, k])


def pad(x: Tensor, rows: int, cols: int) -> Tensor:
    """Return `x` [L, p, d], padded with zeros to [L, rows, cols], contiguous and beginning on a 16-byte boundary.

    The result is `x` itself if nothing has to change, and a copy otherwise.
    """
    if x.shape[1:] == (rows, cols):
        return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    return torch.nn.functional.pad(x, (0, cols - x.shape[2], 0, rows - x.shape[1]))


def pad_square(x: Tensor) -> Tensor:
    """Return `x` [L, n, n] as `pad` does, with n padded to a multiple of 8."""
    if x.shape[-1] % PADDING == 0 and x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return pad(x, padded(x.shape[1]), padded(x.shape[2]))


def kron_products_by(
    make_products: MakeProducts, factor_c: Tensor, factor_k: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return P_C = CCᵀ and P_K = KKᵀ, computed by `make_products` or by another function with its signature."""
    c, k = pad_square(factor_c.to(dtype)), pad_square(factor_k.to(dtype))
    product_c, product_k = torch.empty_like(c), torch.empty_like(k)
    make_products(c, k, product_c, product_k, None)
    p, d = factor_c.shape[-1], factor_k.shape[-1]
    return product_c[:, :p, :p].contiguous(), product_k[:, :d, :d].contiguous()


def kron_products(
    factor_c: Tensor,  # C [L, p, p]
    factor_k: Tensor,  # K [L, d, d]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return P_C = CCᵀ [L, p, p] and P_K = KKᵀ [L, d, d] in `dtype`: see `rootfree_kernels.eager.kron_products`.

    `dtype` is BF16, or FP32 in Triton's interpreter.
    """
    return kron_products_by(make_products, factor_c, factor_k, dtype)
