"""The gradients of a batch of blocks as one tensor G [L, p, d], and the squared norms of G, C and K, in one launch.

    G = ±grad / grad_scale,    ‖G‖²_F = Σ G²,    ‖C‖²_F = Σ C²,    ‖K‖²_F = Σ K²

Each block is read by as many programs as it has partial sums. G is padded with zeros to sides that are multiples of 8:
every row of BF16 then begins on a 16-byte boundary, and matrix kernels need no second path for other rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rootfree_kernels.arguments import Gathered, Tiling
from rootfree_kernels.blocks import matrix_views
from rootfree_kernels.pointer_tables.memory_order import without_negation
from rootfree_kernels.pointer_tables.tables import block_table, on_device
from rootfree_kernels.triton_kernels.common import TRITON_DTYPES, round_nearest
from rootfree_kernels.triton_kernels.configuration import Configuration
from rootfree_kernels.triton_kernels.launch import kernel, launch
from rootfree_kernels.triton_kernels.sizes import PADDING, num_partial_sums, padded

ROWS = tl.constexpr(8)
COLS, NARROW_COLS = tl.constexpr(256), tl.constexpr(128)
"""Columns of a tile. There are fewer if elements are read one by one, because each of them needs its own address."""

GROUP = tl.constexpr(8)
"""Elements of a factor that are loaded at once: 16 bytes of BF16."""


@triton.jit
def factor_squares(x_ptr, block, n, part, num_parts):
    """Return Σx² in FP32 of one of `num_parts` shares of block `block` of a contiguous x [L, n, n].

    If n is odd, a block may begin anywhere. Shares consist of whole groups of 8 elements that begin on 16 bytes. The
    first share also includes the elements before and after these groups, at most 14.
    """
    numel = n.to(tl.int64) * n
    start, stop = block * numel, block * numel + numel
    first, end = tl.cdiv(start, GROUP), stop // GROUP  # in groups
    share = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), num_parts), ROWS * COLS // GROUP) * (ROWS * COLS // GROUP)
    end_of_share = tl.minimum(first + (part + 1) * share, end)
    total = tl.zeros((ROWS * COLS,), dtype=tl.float32)
    for group in range(first + part * share, end_of_share, ROWS * COLS // GROUP):
        index = group * GROUP + tl.arange(0, ROWS * COLS)
        x = tl.load(x_ptr + index, mask=index < end_of_share * GROUP, other=0.0).to(tl.float32)
        total += x * x

    index = tl.arange(0, GROUP)
    before, behind = start + index, tl.maximum(first, end) * GROUP + index
    x = tl.load(x_ptr + before, mask=(before < tl.minimum(first * GROUP, stop)) & (part == 0), other=0.0).to(tl.float32)
    y = tl.load(x_ptr + behind, mask=(behind < stop) & (part == 0), other=0.0).to(tl.float32)
    return tl.sum(total) + tl.sum(x * x + y * y)


@kernel
def kron_gather_kernel(
    grads_table,  # [L, 3], int64: address, row stride and column stride of every block
    c_ptr,  # C [L, p, p], BF16: read only if WITH_FACTORS
    k_ptr,  # K [L, d, d], BF16: read only if WITH_FACTORS
    out_ptr,  # G [L, p8*8, d8*8], BF16: written
    squares_ptr,  # [1 or 3, L, num_parts], FP32: written; partial sums of the squares of G, C and K
    scale_ptr,  # one element, FP32: gradients are divided by it
    sign,  # −1 to maximize, otherwise 1
    num_blocks,  # L
    num_parts,  # programs of a block
    p,  # sides without padding
    d,
    p8,  # padded sides / 8
    d8,
    DTYPE: tl.constexpr,  # of the gradients
    ALIGNED: tl.constexpr,  # whether all rows begin on 16 bytes and d is a multiple of 8
    WITH_FACTORS: tl.constexpr,
):
    """Write G and the partial sums. A program works on some rows of one block, and on a share of its factors."""
    block = (tl.program_id(0) // num_parts).to(tl.int64)
    part = tl.program_id(0) % num_parts
    row_stride = tl.load(grads_table + 3 * block + 1)
    col_stride = tl.load(grads_table + 3 * block + 2)
    grad_ptr = tl.load(grads_table + 3 * block).to(tl.pointer_type(DTYPE))
    rows, cols = p8 * 8, d8 * 8
    out_ptr += block * rows * cols
    factor = sign / tl.load(scale_ptr)
    WIDTH: tl.constexpr = COLS if ALIGNED else NARROW_COLS
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    grad_cols = cols if ALIGNED else d  # d is `cols` in an aligned block: as a multiple of 8 it allows wide loads
    if ALIGNED:  # the compiler knows nothing about the alignment of values that are loaded from a table
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        row_stride = tl.multiple_of(row_stride, 8)
        offsets = i * tl.multiple_of(row_stride.to(tl.int32), 8) + j
        col_stride = 1
    else:
        offsets = i * row_stride + j * col_stride

    out_stride = cols.to(tl.int64)
    share = tl.cdiv(tl.cdiv(rows, num_parts), ROWS) * ROWS
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for row in range(part * share, tl.minimum(part * share + share, rows), ROWS):
        for col in range(0, cols, WIDTH):
            tile_ptr = grad_ptr + row * row_stride + col * col_stride
            grad = tl.load(tile_ptr + offsets, mask=(i < p - row) & (j < grad_cols - col), other=0.0).to(tl.float32)
            grad *= factor
            total += grad * grad
            value = round_nearest(grad, out_ptr.dtype.element_ty)
            tile_ptr = out_ptr + (row * out_stride + col)
            tl.store(tile_ptr + (i * cols + j), value, mask=(i < rows - row) & (j < cols - col))
    tl.store(squares_ptr + block * num_parts + part, tl.sum(total))

    if WITH_FACTORS:
        c_sum = factor_squares(c_ptr, block, p, part, num_parts)
        k_sum = factor_squares(k_ptr, block, d, part, num_parts)
        tl.store(squares_ptr + (num_blocks + block) * num_parts + part, c_sum)
        tl.store(squares_ptr + (2 * num_blocks + block) * num_parts + part, k_sum)


# ---- configuration -----------------------------------------------------------------------------------------------


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that `kron_gather` can launch."""
    for dtype in (tl.float32, tl.bfloat16, tl.float16):
        for aligned in (True, False):
            for with_factors in (True, False):
                pointers = ("*i64", "*bf16", "*bf16", "*bf16", "*fp32", "*fp32")
                scalars = ("fp32", *("i32",) * 6)
                yield Configuration(
                    kron_gather_kernel,
                    (*pointers, *scalars),
                    (dtype, aligned, with_factors),
                    num_warps=4,
                    num_stages=1,
                    kind="elementwise" if aligned else "irregular",
                )


# ---- launcher ----------------------------------------------------------------------------------------------------


def kron_gather(
    grads: list[Tensor],  # each [rows of its parameter, columns], any dtype and strides, or with more axes
    tiling: Tiling,
    factors: list[Tensor],  # C [L, p, p] and K [L, d, d], BF16, or empty
    grad_scale: Tensor | None,  # one element
    dtype: torch.dtype,
    maximize: bool,
) -> Gathered:
    """Return the gradients of a batch of blocks: see `rootfree_kernels.eager.kron_gather`.

    G is padded with zeros to sides that are multiples of 8. `dtype` is BF16, or FP32 in Triton's interpreter. `squares`
    [1 or 3, L, number of partial sums], FP32, holds sums of squares of G (unscaled, before rounding) and of the
    `factors`. A squared Frobenius norm is the sum over the last axis.
    """
    device, (tiles, rows, cols) = grads[0].device, tiling
    if len({grad.dtype for grad in grads}) > 1 or grads[0].dtype not in TRITON_DTYPES:
        grads = [grad.float() for grad in grads]
    views = matrix_views(without_negation(grads))
    table = block_table((views,), tiles, (rows, cols), device)
    num_blocks, parts = table.num_blocks, num_partial_sums(rows, cols)
    out = grads[0].new_empty((num_blocks, padded(rows), padded(cols)), dtype=dtype)
    squares = grads[0].new_empty((1 + len(factors), num_blocks, parts), dtype=torch.float32)
    c, k = factors or (out, out)
    launch(
        kron_gather_kernel,
        num_blocks * parts,
        (table.rows, c, k, out, squares, on_device(device, grad_scale, 1.0)),
        (
            *(-1.0 if maximize else 1.0, num_blocks, parts),
            *(rows, cols, out.shape[1] // PADDING, out.shape[2] // PADDING),
        ),
        (TRITON_DTYPES[views[0].dtype], table.aligned and cols % PADDING == 0, bool(factors)),
    )
    return Gathered(out, squares)
