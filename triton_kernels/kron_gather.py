"""G [L, p, d] from the gradients, and on the way the squared norms of G, C and K.

One launch for a batch. Each block is read by as many programs as it has partial sums; G is padded with zeros to sides
of a multiple of 8, so that every row of BF16 begins on 16 bytes and matrix kernels need no second path.
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
"""Columns of a tile. There are fewer where numbers are read one by one, because each needs an address of its own."""

GROUP = tl.constexpr(8)
"""Numbers of a factor that are loaded at once: 16 bytes of BF16."""


@triton.jit
def factor_squares(x_ptr, block, n, part, num_parts):
    """Return Σx² of one of `num_parts` shares of block `block` of a contiguous x [L, n, n], FP32.

    Where n is odd, a block may begin anywhere. The shares consist of whole groups of 8 numbers that begin on 16 bytes;
    the first share has the up to 14 numbers before and behind them as well.
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
    grads_table,
    c_ptr,
    k_ptr,
    out_ptr,
    squares_ptr,
    scale_ptr,
    sign,
    num_blocks,
    num_parts,
    p,
    d,
    p8,
    d8,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WITH_FACTORS: tl.constexpr,
):
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
    grad_cols = cols if ALIGNED else d  # an aligned block has a multiple of 8 columns, and any number of rows
    if ALIGNED:  # numbers out of a table have no alignment of their own
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


def configurations() -> Iterator[Configuration]:
    for dtype in (tl.float32, tl.bfloat16, tl.float16):
        for aligned in (True, False):
            for with_factors in (True, False):
                pointers = ("*i64", "*bf16", "*bf16", "*bf16", "*fp32", "*fp32")
                numbers = ("fp32", *("i32",) * 6)
                yield Configuration(
                    kron_gather_kernel,
                    (*pointers, *numbers),
                    (dtype, aligned, with_factors),
                    num_warps=4,
                    num_stages=1,
                    kind="elementwise" if aligned else "irregular",
                )


def kron_gather(
    grads: list[Tensor],  # each [rows of its parameter, columns], any dtype and strides, or with more axes
    tiling: Tiling,
    factors: list[Tensor],  # C [L, p, p] and K [L, d, d], BF16, or empty
    grad_scale: Tensor | None,  # one element
    dtype: torch.dtype,
    maximize: bool,
) -> Gathered:
    """Return the gradients of a batch of blocks: see `rootfree_kernels.eager.kron_gather`.

    G is padded with zeros to sides of a multiple of 8. `squares` [1 or 3, L, number of partial sums], FP32, holds sums
    of squares of G (unscaled and not yet rounded) and, where they are given, of C and K. A squared Frobenius norm is
    the sum over the last axis.
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
