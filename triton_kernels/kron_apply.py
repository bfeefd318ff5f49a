"""The step of the weights where more surrounds U than the paper's heavy ball: gradient momentum, or a fixed size of U.

1  M ← α₁M + (1−α₁)G,  G ← M'              one launch if the momentum averages gradients; M' is Nesterov's, or M
2  G ← U = X·G·Y                           cuBLAS, two batched products
3  partial sums of U²                      one launch if the norm of U is given
4  W ← (1 − β₁κ)W − β₁·(norm/‖U‖)·U        one launch; or buf ← α₁buf + U + κW,  W ← W − β₁buf

Each program has a share of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rootfree_kernels import ranges
from rootfree_kernels.arguments import StepOptions, Weights
from rootfree_kernels.pointer_tables.tables import BlockTable, RandomBits, constant
from rootfree_kernels.rounding import SLOT_WEIGHT
from rootfree_kernels.triton_kernels.common import (
    TRITON_DTYPES,
    block_is_stepped,
    block_pointers,
    count_program,
    is_finite,
    load_stored,
    random_key,
    round_nearest,
    store_rounded,
    sum_of_parts,
)
from rootfree_kernels.triton_kernels.configuration import Configuration, Kind
from rootfree_kernels.triton_kernels.launch import kernel, launch
from rootfree_kernels.triton_kernels.sizes import PADDING, STEP_COLS, STEP_ROWS, num_step_programs

NUM_WARPS = 4

_SLOT = tl.constexpr(SLOT_WEIGHT)
_ROWS, _COLS = tl.constexpr(STEP_ROWS), tl.constexpr(STEP_COLS)
_GROUP = tl.constexpr(PADDING * PADDING)  # a padded block has a multiple of these elements


@triton.jit
def _share(num_programs, p, d):
    """Return what this program works on: (block, first tile, tile after the last one, tiles across the block)."""
    block, part = (tl.program_id(0) // num_programs).to(tl.int64), tl.program_id(0) % num_programs
    across = tl.cdiv(d, _COLS)
    tiles = tl.cdiv(p, _ROWS) * across
    share = tl.cdiv(tiles, num_programs)
    return block, part * share, tl.minimum(part * share + share, tiles), across


@kernel
def kron_average_kernel(
    grad_ptr,  # G [L, p8*8, d8*8], BF16: updated
    blocks_table,  # [L, 3, 3], int64, as in `kron_apply_kernel`
    squares_ptr,  # [1 or 3, L, num_parts], FP32: only the sums of G² are read
    ok_ptr,  # [L] or one element, bool: whether the factors were updated
    found_inf_ptr,  # one element, FP32
    ok_stride,  # 0 without an update in this step
    num_parts,  # partial sums of a block
    num_programs,  # of a block
    p,  # sides without padding
    d,
    p8,  # padded sides / 8
    d8,
    nesterov,  # 0 or 1
    momentum,  # α₁
    one_minus_momentum,
    BUFFER: tl.constexpr,  # dtype of M
    ALIGNED: tl.constexpr,  # whether all rows begin on 16 bytes and d is a multiple of 8
):
    """Write M, and M' over G, of the blocks that are stepped."""
    rows, cols = p8 * 8, d8 * 8
    if ALIGNED:
        d = cols  # the same value, which the compiler knows to be a multiple of 8
    block, first, end, across = _share(num_programs, p, d)
    ok = block_is_stepped(squares_ptr, ok_ptr, found_inf_ptr, block, ok_stride, num_parts)
    i, j = tl.arange(0, _ROWS)[:, None], tl.arange(0, _COLS)[None, :]
    for t in range(first, tl.where(ok, end, first)):
        row, col = t // across * _ROWS, t % across * _COLS
        mask = (i < p - row) & (j < d - col)
        buffer_ptrs = block_pointers(blocks_table + 9 * block + 3, row, col, i, j, BUFFER, ALIGNED)
        grad_ptrs = grad_ptr + (block * rows * cols + row.to(tl.int64) * cols + col) + (i * cols + j)
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        grad = one_minus_momentum * tl.where(is_finite(grad), grad, 0.0)
        m = momentum * tl.load(buffer_ptrs, mask=mask, other=0.0).to(tl.float32) + grad
        tl.store(buffer_ptrs, round_nearest(m, BUFFER), mask=mask)
        m = tl.where(nesterov != 0, momentum * m + grad, m)
        tl.store(grad_ptrs, round_nearest(m, grad_ptr.dtype.element_ty), mask=mask)


@kernel
def kron_size_kernel(
    u_ptr,  # U [L, p8*8, d8*8], BF16
    sums_ptr,  # [L, num_programs], FP32: written
    num_programs,  # of a block
    p8,  # padded sides / 8
    d8,
):
    """Write partial sums of U². Elements that are not finite count as 0, and padding is 0."""
    block, part = (tl.program_id(0) // num_programs).to(tl.int64), tl.program_id(0) % num_programs
    TILE: tl.constexpr = _ROWS * _COLS
    groups = p8.to(tl.int64) * d8
    share = tl.cdiv(tl.cdiv(groups, num_programs), TILE // _GROUP) * (TILE // _GROUP)
    end = tl.minimum(part * share + share, groups)
    total = tl.zeros((TILE,), dtype=tl.float32)
    for group in range(part * share, end, TILE // _GROUP):
        index = group * _GROUP + tl.arange(0, TILE)
        u = tl.load(u_ptr + block * groups * _GROUP + index, mask=index < end * _GROUP, other=0.0).to(tl.float32)
        u = tl.where(is_finite(u), u, 0.0)
        total += u * u
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))


@kernel
def kron_apply_kernel(
    u_ptr,  # U [L, p8*8, d8*8], BF16
    blocks_table,  # [L, 3, 3], int64: (address, row stride, column stride) of weights, buffer and residuals
    counter_ptr,  # [L], int64: see `count_program`
    skipped_ptr,  # [L], int32: updated
    squares_ptr,  # [1 or 3, L, num_parts], FP32: only the sums of G² are read
    sums_ptr,  # [L, num_programs], FP32: partial sums of U², or a stand-in
    update_norms_ptr,  # [L], FP32, or a stand-in
    ok_ptr,  # [L] or one element, bool: whether the factors were updated
    found_inf_ptr,  # one element, FP32
    seeds_ptr,  # [L] or one element, int32
    steps_ptr,  # [L] or one element, int64: added to `step_value`
    lr_ptr,  # one element, FP32: added to `lr_value`
    lr_value,
    step_value,  # int32
    scaled,  # 0 or 1: whether U is scaled to a norm
    ok_stride,  # 0 without an update in this step
    seed_stride,  # 0 if no bits are drawn
    step_stride,  # 0 if all blocks have the same step
    num_parts,  # partial sums of a block
    num_programs,  # of a block
    p,  # sides without padding
    d,
    p8,  # padded sides / 8
    d8,
    momentum,  # α₁
    weight_decay,  # κ
    decoupled,  # 0 or 1
    WEIGHT: tl.constexpr,  # dtypes
    BUFFER: tl.constexpr,  # of the heavy ball's buffer; None without a heavy ball
    ROUNDING: tl.constexpr,  # of the weights
    ALIGNED: tl.constexpr,  # whether all rows begin on 16 bytes and d is a multiple of 8
):
    """Step weights, and the heavy ball's buffers."""
    rows, cols = p8 * 8, d8 * 8
    if ALIGNED:
        d = cols  # the same value, which the compiler knows to be a multiple of 8
    block, first, end, across = _share(num_programs, p, d)
    ok = block_is_stepped(squares_ptr, ok_ptr, found_inf_ptr, block, ok_stride, num_parts)
    square = sum_of_parts(sums_ptr + block * num_programs * scaled, num_programs * scaled)
    norm = tl.load(update_norms_ptr + block * scaled)
    scale = tl.where(scaled != 0, tl.where(square > 0.0, norm / tl.sqrt(square), 0.0), 1.0)

    lr = lr_value + tl.load(lr_ptr)
    step = step_value + tl.load(steps_ptr + block * step_stride)
    key = random_key(tl.load(seeds_ptr + block * seed_stride), step, _SLOT)
    i, j = tl.arange(0, _ROWS)[:, None], tl.arange(0, _COLS)[None, :]
    worst = 0  # the largest magnitude of U as a bit pattern, since `tl.max` of floats drops NaN
    for t in range(first, tl.where(ok, end, first)):
        row, col = t // across * _ROWS, t % across * _COLS
        mask = (i < p - row) & (j < d - col)
        u_ptrs = u_ptr + (block * rows * cols + row.to(tl.int64) * cols + col) + (i * cols + j)
        u = tl.load(u_ptrs, mask=mask, other=0.0).to(tl.float32)
        worst = tl.maximum(worst, tl.max(u.to(tl.int32, bitcast=True) & 0x7FFFFFFF))
        u = scale * tl.where(is_finite(u), u, 0.0)
        weight_ptrs = block_pointers(blocks_table + 9 * block, row, col, i, j, WEIGHT, ALIGNED)
        residual_ptrs = block_pointers(blocks_table + 9 * block + 6, row, col, i, j, tl.int16, ALIGNED)
        weight = load_stored(weight_ptrs, residual_ptrs, 0, mask, ROUNDING)
        decay = tl.where(weight_decay != 0.0, weight_decay * weight, 0.0)  # 0·∞ would be NaN
        if BUFFER is not None:
            buffer_ptrs = block_pointers(blocks_table + 9 * block + 3, row, col, i, j, BUFFER, ALIGNED)
            u += momentum * tl.load(buffer_ptrs, mask=mask, other=0.0).to(tl.float32)
            u += tl.where(decoupled != 0, 0.0, decay)
            tl.store(buffer_ptrs, round_nearest(u, BUFFER), mask=mask)
            decay = tl.where(decoupled != 0, decay, 0.0)
        weight -= lr * (u + decay)
        index = (row + i) * d + (col + j)
        store_rounded(weight, weight_ptrs, residual_ptrs, 0, mask, key, index, ROUNDING)
    left_out = tl.where(ok & is_finite(square) & (worst < 0x7F800000), 0, 1)
    count_program(counter_ptr, skipped_ptr, block, left_out, num_programs)


# ---- configuration -----------------------------------------------------------------------------------------------

BUFFERS = (tl.float32, tl.bfloat16)


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that `step_in_parts` can launch."""
    yield Configuration(kron_size_kernel, ("*bf16", "*fp32", *("i32",) * 3), (), NUM_WARPS, 1, kind="irregular")
    pointers = ("*bf16", "*i64", "*i64", "*i32", "*fp32", "*fp32", "*fp32", "*i1", "*fp32", "*i32", "*i64", "*fp32")
    scalars = ("fp32", *("i32",) * 11, "fp32", "fp32", "i32")
    weights = [(tl.float32, "nearest"), (tl.float16, "nearest")]
    weights += [(tl.bfloat16, rounding) for rounding in ("stochastic", "compensated", "nearest")]
    for aligned in (True, False):
        kind: Kind = "elementwise" if aligned else "irregular"
        for buffer in BUFFERS:
            arguments = ("*bf16", "*i64", "*fp32", "*i1", "*fp32", *("i32",) * 8, "fp32", "fp32")
            yield Configuration(kron_average_kernel, arguments, (buffer, aligned), NUM_WARPS, 1, kind)
        for weight, rounding in weights:
            for kept in (*BUFFERS, None):
                constants = (weight, kept, rounding, aligned)
                yield Configuration(kron_apply_kernel, (*pointers, *scalars), constants, NUM_WARPS, 1, kind)


# ---- launcher ----------------------------------------------------------------------------------------------------


class StepCall(NamedTuple):
    """The arguments of a step as kernels take them."""

    grad: Tensor  # G [L, padded p, padded d]: overwritten
    squares: Tensor  # [1 or 3, L, partial sums], FP32
    x: Tensor  # as G: memory for X·G
    sides: tuple[int, int]  # p and d, without padding
    table: BlockTable  # of weights, buffers and residuals
    aligned: bool
    rounding: str  # of the weights
    ok: Tensor  # [L] or one element, bool
    ok_stride: int
    found_inf: Tensor  # one element
    bits: RandomBits
    lr: Tensor  # the learning rate is the sum of this and `lr_value`
    lr_value: float


def step_in_parts(call: StepCall, weights: Weights, left: Tensor, right: Tensor, options: StepOptions) -> None:
    """Step the weights along U = X·G·Y. X [L, p, p] is `left`, Y [L, d, d] is `right`; both are padded as G is."""
    grad, squares, ok_stride = call.grad, call.squares, call.ok_stride
    num_blocks, parts, programs = len(grad), squares.shape[-1], num_step_programs(*call.sides)
    sizes = *call.sides, grad.shape[1] // PADDING, grad.shape[2] // PADDING
    averages, norms = options.momentum_on == "gradient", weights.update_norms
    buffer = TRITON_DTYPES[weights.buffers[0].dtype]
    sums = squares if norms is None else squares.new_empty((num_blocks, programs))
    if averages:
        launch(
            kron_average_kernel,
            num_blocks * programs,
            (grad, call.table.rows, squares, call.ok, call.found_inf),
            (
                *(ok_stride, parts, programs, *sizes, int(options.nesterov)),
                *(float(options.momentum), 1.0 - options.momentum),
            ),
            (buffer, call.aligned),
            NUM_WARPS,
        )
    torch.bmm(left, grad, out=call.x)
    torch.bmm(call.x, right, out=grad)

    ranges.phase("apply")
    if norms is not None:
        launch(kron_size_kernel, num_blocks * programs, (grad, sums), (programs, *sizes[2:]), (), NUM_WARPS)
    launch(
        kron_apply_kernel,
        num_blocks * programs,
        (
            *(grad, call.table.rows, call.table.counters, weights.skipped, squares, sums),
            constant(0.0, grad.device) if norms is None else norms,
            *(call.ok, call.found_inf, call.bits.seeds, call.bits.steps, call.lr),
        ),
        (
            *(call.lr_value, call.bits.step, int(norms is not None)),
            *(ok_stride, call.bits.stride, call.bits.step_stride, parts, programs, *sizes),
            *(float(options.momentum), float(options.weight_decay), int(options.decoupled)),
        ),
        (TRITON_DTYPES[weights.params[0].dtype], None if averages else buffer, call.rounding, call.aligned),
        NUM_WARPS,
    )
