"""The norm-clipped momentum of the sides of a batch, in two launches.

    m ← α₂m + (1−α₂)Δ,    factor = 1/max(1, ‖m‖)

The first launch computes the norms of the new m. The second one decides which blocks are finite on all sides, and
writes their m and the factors. Both compute the new m from the old one: reading the old one twice costs no more than
writing the new one in between, and less if m is BF16.

A program works on a share of one block. The results of the shares are added in a fixed order, so that equal arguments
yield bitwise equal results.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rootfree_kernels.pointer_tables.clipped_momentum import cut, momentum_call
from rootfree_kernels.triton_kernels.common import TRITON_DTYPES, load_masked, pointer_to, round_nearest
from rootfree_kernels.triton_kernels.configuration import Configuration, Kind
from rootfree_kernels.triton_kernels.launch import kernel, launch

MAX_SHARES = 512
"""The most shares of a block. Every program of the second launch reads the results of all of them."""

MIN_SHARE = 4096
"""The fewest elements of a share, unless the block has fewer."""

ROWS, COLS, NUM_WARPS = 8, 256, 4
TILE = ROWS * COLS

_MAX_SHARES, _TILE, _ROWS, _COLS = (tl.constexpr(x) for x in (MAX_SHARES, TILE, ROWS, COLS))
_PART = tl.constexpr(TILE // 2)  # elements of a masked tile; not _TILE, or Triton would use the layout for vectors
_COLUMNS = tl.constexpr(8)  # of the table of sides
_VECTOR = tl.constexpr(4)  # FP32 elements in 128 bits; BF16 m is read four elements at a time too, in the same layout


@triton.jit
def _share(side_table, owner_table, M: tl.constexpr):
    """Return what this program works on: (side, its row of the table, block, share, address of m, of Δ, elements)."""
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
    """Return α₂m + (1−α₂)Δ in FP32, with 0 where `mask` is False."""
    m = load_masked(m_ptr + offsets, mask).to(tl.float32)
    return alpha * m + one_minus_alpha * load_masked(delta_ptr + offsets, mask)


@triton.jit
def _sum_of_squares(m, delta, length, alpha, one_minus_alpha, M: tl.constexpr):
    """Return Σx² of `length` elements x of the new m. `m` and `delta` are addresses."""
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
    """Return the largest Σ|x| of a row of the new m, or infinity if a sum is not finite: tl.max drops NaN."""
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
    # [sides, 8], int64. Columns: addresses of 0 m and 1 Δ; elements of 2 a block, 3 its last axis and 4 a share;
    # 5 shares of a block; 6 programs of the side; 7 its first program
    side_table,
    owner_table,  # [programs], int32: the side that a program works on
    share_ptr,  # [programs], FP32: written
    alpha,  # α₂
    one_minus_alpha,
    M: tl.constexpr,  # dtype of m
    ROW_SUM: tl.constexpr,  # whether the norm is the largest row sum
):
    """Write the largest row sum, or else Σx², of every share of the new m."""
    _, row_table, _, _, m, delta, length = _share(side_table, owner_table, M)
    if ROW_SUM:
        cols = tl.load(row_table + 3).to(tl.int32)
        if ((m | delta) % 16 == 0) & (cols % 4 == 0):
            cols = cols // 4 * 4  # the same value, which the compiler now knows to be a multiple of 4
            norm = _largest_row_sum(m, delta, length // cols, cols, alpha, one_minus_alpha, M, _VECTOR)
        else:
            norm = _largest_row_sum(m, delta, length // cols, cols, alpha, one_minus_alpha, M, 1)
    else:
        norm = _sum_of_squares(m, delta, length, alpha, one_minus_alpha, M)
    tl.store(share_ptr + tl.program_id(0), norm)


@kernel
def momentum_kernel(
    side_table,  # [sides, 8], int64, as in `norms_kernel`
    owner_table,  # [programs], int32
    share_ptr,  # [programs], FP32: what `norms_kernel` wrote
    found_inf_ptr,  # one element, FP32
    clip_ptr,  # [sides, L], FP32: written
    alpha,  # α₂
    one_minus_alpha,
    num_sides,
    num_blocks,  # L
    M: tl.constexpr,  # dtype of m
    CLIP: tl.constexpr,  # "frobenius", "row_sum" or "none"
):
    """Write m of the blocks that are finite on all sides, and the factors 1/max(1, ‖m‖), which are 0 for the others."""
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
    """Yield every configuration that `clipped_momentum` can launch."""
    pointers = ("*i64", "*i32", "*fp32")
    for dtype in DTYPES:
        m = TRITON_DTYPES[dtype]
        for row_sum in (False, True):
            yield Configuration(norms_kernel, (*pointers, "fp32", "fp32"), (m, row_sum), NUM_WARPS, 1, "irregular")
        arguments = (*pointers, "*fp32", "*fp32", "fp32", "fp32", "i32", "i32")
        for clip in CLIPS:
            kind: Kind = "elementwise" if dtype == torch.float32 else "irregular"  # BF16 is stored in 64 bits
            yield Configuration(momentum_kernel, arguments, (m, clip), NUM_WARPS, 1, kind)


# ---- launcher ----------------------------------------------------------------------------------------------------


def _shares(numel: int, unit: int) -> tuple[int, int]:
    """Return (elements of a share, shares) of a block of `numel` elements. A share is a multiple of `unit` elements."""
    return cut(numel, max(MIN_SHARE, -(-numel // MAX_SHARES)), unit)


def clipped_momentum(
    momenta: list[Tensor],  # a side each: [L, …], FP32 or BF16; [L, n, n] if `clip` is "row_sum"
    deltas: list[Tensor],  # of the same shapes, FP32
    found_inf: Tensor | None,  # one element
    riemannian_momentum: float,
    clip: str,
) -> Tensor:
    """Update m ← α₂m + (1−α₂)Δ in place. Return 1/max(1, ‖m‖), FP32 [sides, L] (Lin et al., ICML 2024, Fig. 7).

    See `rootfree_kernels.eager.clipped_momentum` for the arguments and for blocks that are skipped. Here the deltas are
    not changed. Momenta of several dtypes are copied to FP32 first. Equal arguments yield bitwise equal results.
    """
    row_sum = clip == "row_sum"
    call = momentum_call(
        lambda numel, cols: _shares(numel, ROWS * cols if row_sum else TILE), momenta, deltas, found_inf
    )
    scalars = float(riemannian_momentum), 1.0 - riemannian_momentum
    where, m_type = (call.where.rows, call.where.owners, call.sums), TRITON_DTYPES[call.dtype]
    launch(norms_kernel, call.where.num_programs, where, scalars, (m_type, row_sum), NUM_WARPS)
    tensors = (*where, call.found_inf, call.clips)
    launch(momentum_kernel, call.where.num_programs, tensors, (*scalars, *call.clips.shape), (m_type, clip), NUM_WARPS)
    return call.finish()
