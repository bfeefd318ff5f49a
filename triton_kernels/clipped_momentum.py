"""The normalised Riemannian momentum of a list of tensors [L, …] of any sizes, in two launches.

    m ← α₂m + (1−α₂)Δ,    factor ← 1/max(1, ‖m‖)

The first launch sums up ‖·‖ of the new m, the second decides which blocks are finite on all sides, makes the factors
and writes m. Both compute the new m from the old one: to read it twice costs no more than to write it in between, and
less where m is BF16. A program takes a share of one block; the shares' sums are added up in the same order every time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rootfree_kernels.pointer_tables.clipped_momentum import cut, momentum_call
from rootfree_kernels.triton_kernels.common import TRITON_DTYPES, load_masked, pointer_to, round_nearest
from rootfree_kernels.triton_kernels.configuration import Configuration
from rootfree_kernels.triton_kernels.launch import kernel, launch

MAX_SHARES = 512
"""Shares of a block: every program of the second launch reads the sums of all of them."""

MIN_SHARE = 4096
"""Numbers of a share, unless the block has fewer."""

ROWS, COLS, NUM_WARPS = 8, 256, 4
TILE = ROWS * COLS

_MAX_SHARES, _TILE, _ROWS, _COLS = (tl.constexpr(x) for x in (MAX_SHARES, TILE, ROWS, COLS))
_PART = tl.constexpr(TILE // 2)  # of a masked tile: of another size, or Triton lays it out in fours as well
_COLUMNS = tl.constexpr(8)
_VECTOR = tl.constexpr(4)  # of FP32 that are 128 bits; BF16 next to it is accessed in 64, and so lies alike


@triton.jit
def _share(side_table, owner_table, M: tl.constexpr):
    """What this program works on: the side's index and row, the block, the share, its numbers of m and Δ."""
    program = tl.program_id(0)
    side = tl.load(owner_table + program)
    row_table = side_table + side * _COLUMNS
    size, share_size = tl.load(row_table + 2), tl.load(row_table + 4)
    num_shares = tl.load(row_table + 5).to(tl.int32)
    index = program - tl.load(row_table + 7).to(tl.int32)
    block, share = (index // num_shares).to(tl.int64), index % num_shares
    length = tl.minimum(size - share * share_size, share_size).to(tl.int32)
    start = block * size + share * share_size
    m = tl.load(row_table) + start * (M.primitive_bitwidth // 8)
    delta = tl.load(row_table + 1) + start * 4
    return side, row_table, block, share, m, delta, length


@triton.jit
def _new_m(m_ptr, delta_ptr, offsets, mask, alpha, one_minus_alpha):
    """α₂m + (1−α₂)Δ, FP32; 0 where `mask` is False."""
    m = load_masked(m_ptr + offsets, mask).to(tl.float32)
    return alpha * m + one_minus_alpha * load_masked(delta_ptr + offsets, mask)


@triton.jit
def _sum_of_squares(m, delta, length, alpha, one_minus_alpha, M: tl.constexpr):
    m_ptr, delta_ptr = pointer_to(m, M, _VECTOR), pointer_to(delta, tl.float32, _VECTOR)
    whole = tl.where((m | delta) % 16 == 0, length // _TILE * _TILE, 0)
    squares = tl.zeros((_TILE,), tl.float32)
    for first in range(0, whole, _TILE):
        x = _new_m(m_ptr, delta_ptr, first + tl.arange(0, _TILE), None, alpha, one_minus_alpha)
        squares += x * x
    total = tl.sum(squares)

    m_ptr, delta_ptr = pointer_to(m, M, 1), pointer_to(delta, tl.float32, 1)
    squares = tl.zeros((_PART,), tl.float32)
    for first in range(whole, length, _PART):
        offsets = first + tl.arange(0, _PART)
        x = _new_m(m_ptr, delta_ptr, offsets, offsets < length, alpha, one_minus_alpha)
        squares += x * x
    return total + tl.sum(squares)


@triton.jit
def _largest_row_sum(m, delta, rows, cols, alpha, one_minus_alpha, M: tl.constexpr, VECTOR: tl.constexpr):
    """The largest Σ|x| of a row; infinity where one is not finite (a maximum would lose a NaN)."""
    m_ptr, delta_ptr = pointer_to(m, M, VECTOR), pointer_to(delta, tl.float32, VECTOR)
    largest = 0.0
    for first_row in range(0, rows, _ROWS):
        row = (first_row + tl.arange(0, _ROWS))[:, None]
        sums = tl.zeros((_ROWS, _COLS), tl.float32)
        for first_col in range(0, cols, _COLS):
            col = (first_col + tl.arange(0, _COLS))[None, :]
            inside = (row < rows) & (col < cols)
            sums += tl.abs(_new_m(m_ptr, delta_ptr, row * cols + col, inside, alpha, one_minus_alpha))
        row_sums = tl.sum(sums, 1)
        largest = tl.maximum(largest, tl.max(tl.where(row_sums < float("inf"), row_sums, float("inf"))))
    return largest


@kernel
def norms_kernel(
    side_table,  # [sides, 8]: addresses of m and Δ; sizes of a block, of its last axis, of a share; shares of a block;
    owner_table,  # number of programs; first program; and [programs]: whose side a program works on
    share_ptr,  # [programs]: where each puts its sum
    alpha,
    one_minus_alpha,
    M: tl.constexpr,
    ROW_SUM: tl.constexpr,
):
    _, row_table, _, _, m, delta, length = _share(side_table, owner_table, M)
    if ROW_SUM:
        cols = tl.load(row_table + 3).to(tl.int32)
        if ((m | delta) % 16 == 0) & (cols % 4 == 0):
            cols = cols // 4 * 4  # as Triton can see now
            norm = _largest_row_sum(m, delta, length // cols, cols, alpha, one_minus_alpha, M, _VECTOR)
        else:
            norm = _largest_row_sum(m, delta, length // cols, cols, alpha, one_minus_alpha, M, 1)
    else:
        norm = _sum_of_squares(m, delta, length, alpha, one_minus_alpha, M)
    tl.store(share_ptr + tl.program_id(0), norm)


@kernel
def momentum_kernel(
    side_table,  # as in `norms_kernel`
    owner_table,
    share_ptr,
    found_inf_ptr,
    clip_ptr,  # [sides, L]
    alpha,
    one_minus_alpha,
    num_sides,
    num_blocks,
    M: tl.constexpr,
    CLIP: tl.constexpr,
):
    side, _, block, share, m, delta, length = _share(side_table, owner_table, M)
    ok = tl.load(found_inf_ptr) == 0
    bound = 1.0
    for other in range(0, num_sides):
        num_shares = tl.load(side_table + other * _COLUMNS + 5)
        first = tl.load(side_table + other * _COLUMNS + 7) + block * num_shares
        shares = tl.arange(0, _MAX_SHARES)
        sums = tl.load(share_ptr + first + shares, mask=shares < num_shares, other=0.0)
        norm = tl.max(sums) if CLIP == "row_sum" else tl.sqrt(tl.sum(sums))
        ok = ok & (norm < float("inf"))
        if CLIP != "none":
            bound = tl.where(other == side, tl.maximum(norm, 1.0), bound)
    if share == 0:
        tl.store(clip_ptr + side.to(tl.int64) * num_blocks + block, tl.where(ok, 1.0 / bound, 0.0))

    length = tl.where(ok, length, 0)
    m_ptr, delta_ptr = pointer_to(m, M, _VECTOR), pointer_to(delta, tl.float32, _VECTOR)
    whole = tl.where((m | delta) % 16 == 0, length // _TILE * _TILE, 0)
    for first in range(0, whole, _TILE):
        offsets = first + tl.arange(0, _TILE)
        x = _new_m(m_ptr, delta_ptr, offsets, None, alpha, one_minus_alpha)
        tl.store(m_ptr + offsets, round_nearest(x, M))
    m_ptr, delta_ptr = pointer_to(m, M, 1), pointer_to(delta, tl.float32, 1)
    for first in range(whole, length, _PART):
        offsets = first + tl.arange(0, _PART)
        x = _new_m(m_ptr, delta_ptr, offsets, offsets < length, alpha, one_minus_alpha)
        tl.store(m_ptr + offsets, round_nearest(x, M), mask=offsets < length)


# ---- configuration -----------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16)
CLIPS = ("frobenius", "row_sum", "none")


def configurations() -> Iterator[Configuration]:
    pointers = ("*i64", "*i32", "*fp32")
    for dtype in DTYPES:
        m = TRITON_DTYPES[dtype]
        for row_sum in (False, True):
            yield Configuration(norms_kernel, (*pointers, "fp32", "fp32"), (m, row_sum), NUM_WARPS, 1, "irregular")
        arguments = (*pointers, "*fp32", "*fp32", "fp32", "fp32", "i32", "i32")
        for clip in CLIPS:
            kind = "elementwise" if dtype == torch.float32 else "irregular"  # stores 64 bits of BF16
            yield Configuration(momentum_kernel, arguments, (m, clip), NUM_WARPS, 1, kind)


# ---- launcher ----------------------------------------------------------------------------------------------------


def _shares(numel: int, unit: int) -> tuple[int, int]:
    """(numbers of a share, shares) of a block of `numel` numbers; a share is a multiple of `unit` numbers."""
    return cut(numel, max(MIN_SHARE, -(-numel // MAX_SHARES)), unit)


def clipped_momentum(
    momenta: list[Tensor],
    deltas: list[Tensor],
    found_inf: Tensor | None,
    riemannian_momentum: float,
    clip: str,
) -> Tensor:
    """m ← α₂m + (1−α₂)Δ in place; gives 1/max(1, ‖m‖), FP32 [sides, L] (Lin et al., ICML 2024, Fig. 7).

    See `rootfree_kernels.eager.clipped_momentum`, whose results these are. `momenta` are FP32 or BF16 [L, …], `deltas`
    FP32 of the same shapes ([L, n, n] for `clip="row_sum"`), and stay as they are. The result is the same to the bit
    whenever the arguments are.
    """
    row_sum = clip == "row_sum"
    call = momentum_call(
        lambda numel, cols: _shares(numel, ROWS * cols if row_sum else TILE), momenta, deltas, found_inf
    )
    numbers = float(riemannian_momentum), 1.0 - riemannian_momentum
    where, m_type = (call.where.rows, call.where.owners, call.sums), TRITON_DTYPES[call.dtype]
    launch(norms_kernel, call.where.num_programs, where, numbers, (m_type, row_sum), NUM_WARPS)
    tensors = (*where, call.found_inf, call.clips)
    launch(momentum_kernel, call.where.num_programs, tensors, (*numbers, *call.clips.shape), (m_type, clip), NUM_WARPS)
    return call.finish()
