"""What an update of the factors needs to know of each block before any product is taken, in one launch.

    q        the mean curvature (see `rootfree_kernels.eager.curvature`)
    weights  of the damping: λ‖K‖²_F of C's side and λ‖C‖²_F of K's side, or for the whitened direction √λ·(tr K/d) and
             √λ·(tr C/p); with `relative_damping`, λq stands in the place of λ
    γ/2      or NaN where the gradient is 0: it makes the norm of m' NaN, so that the block is left as it is

Where the first gradient has come and `factor_init` is "gradient", the launch also writes C = K = (q(1+λ))^(−1/4)·I. For
that, many programs share a block. Where a block does not start, all but one of them return at once.

The paper's rule needs none of this, and does not launch it.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from rootfree_kernels.arguments import FactorOptions
from rootfree_kernels.eager.curvature import CURVATURE_STEP
from rootfree_kernels.pointer_tables.tables import on_device
from rootfree_kernels.triton_kernels.common import (
    effective_rounding,
    is_finite,
    round_nearest,
    split_compensated,
    store_rounded,
    sum_of_parts,
)
from rootfree_kernels.triton_kernels.configuration import Configuration
from rootfree_kernels.triton_kernels.factor_workspace import FactorWorkspace
from rootfree_kernels.triton_kernels.launch import kernel, launch
from rootfree_kernels.triton_kernels.sizes import PADDING, num_start_programs

ROWS, COLS, NUM_WARPS = 8, 256, 4

_ROWS, _COLS = tl.constexpr(ROWS), tl.constexpr(COLS)
_DIAGONAL = tl.constexpr(1024)  # elements of a diagonal that are loaded at once
_STEP = tl.constexpr(CURVATURE_STEP)


@triton.jit
def mean_of_diagonal(x_ptr, size, n):
    """Return the mean of `size` diagonal elements of an n × n matrix, or NaN of none. It is always added in the same
    order."""
    index = tl.arange(0, _DIAGONAL)
    total = tl.zeros((_DIAGONAL,), dtype=tl.float32)
    for start in range(0, size, _DIAGONAL):
        places = (start + index).to(tl.int64) * (n + 1)
        total += tl.load(x_ptr + places, mask=start + index < size, other=0.0).to(tl.float32)
    return tl.sum(total) / size


@triton.jit
def write_identity(x_ptr, residual_ptr, scale, size, n, part, num_parts, ROUNDING: tl.constexpr):
    """Write one of `num_parts` shares of scale·I, of `size` rows, to a matrix that is padded to n rows."""
    i, j = tl.arange(0, _ROWS)[:, None], tl.arange(0, _COLS)[None, :]
    share = tl.cdiv(tl.cdiv(n, num_parts), _ROWS) * _ROWS
    for row in range(part * share, tl.minimum(part * share + share, n), _ROWS):
        for col in range(0, n, _COLS):
            tile, offsets, mask = row * n.to(tl.int64) + col, i * n + j, (i < n - row) & (j < n - col)
            x = tl.where((row + i == col + j) & (row + i < size), scale, 0.0)
            store_rounded(x, x_ptr + tile, residual_ptr + tile, offsets, mask, 0, 0, ROUNDING)


@kernel
def kron_start_kernel(
    c_ptr,  # C [L, p8*8, p8*8], BF16: written where a block starts
    k_ptr,  # K [L, d8*8, d8*8], BF16
    residual_c_ptr,  # int16, as C and K: written where a block starts if ROUNDING is "compensated"
    residual_k_ptr,
    squares_ptr,  # [1 or 3, L, num_parts], FP32: sums of squares of G, C and K
    curvature_ptr,  # q [L], FP32, or one element
    found_inf_ptr,  # one element, FP32
    # [L, 4], FP32: written. Damping of 0 C's side and 1 K's side; 2 γ/2 or NaN; 3 the new q
    weights_ptr,
    num_blocks,  # L
    num_parts,  # partial sums of a block
    num_programs,  # of a block
    p,  # sides without padding
    d,
    p8,  # padded sides / 8
    d8,
    batch_size,  # B
    damping,  # λ
    gamma,  # γ
    follows,  # 0 or 1: whether there is a curvature
    is_relative,  # 0 or 1: whether λq stands in the place of λ
    may_start,  # 0 or 1: whether the first gradient makes the factors
    WHITENED: tl.constexpr,
    ROUNDING: tl.constexpr,  # "compensated" if there are residuals, otherwise "nearest"
):
    """Write the weights of a block, and its factors if it starts now."""
    block, part = (tl.program_id(0) // num_programs).to(tl.int64), tl.program_id(0) % num_programs
    old_q = tl.load(curvature_ptr + block * follows)
    square = sum_of_parts(squares_ptr + block * num_parts, num_parts)
    mean_square = square * (batch_size / (p.to(tl.float32) * d.to(tl.float32)))
    begins = (follows != 0) & (old_q == 0.0) & (mean_square > 0.0) & is_finite(mean_square)
    begins = begins & (tl.load(found_inf_ptr) == 0.0)
    is_idle = mean_square == 0.0
    q = tl.where(begins, mean_square, tl.where(is_idle, old_q, old_q + _STEP * (mean_square - old_q)))
    starts = begins & (may_start != 0)
    scale = 1.0 / tl.sqrt(tl.sqrt(q * (1.0 + damping)))
    rows, cols = p8 * 8, d8 * 8
    c_ptr += block * rows * rows
    k_ptr += block * cols * cols
    if part == 0:
        if ROUNDING == "compensated":
            stored, _ = split_compensated(scale)
        else:
            stored = round_nearest(scale, c_ptr.dtype.element_ty)
        stored = stored.to(tl.float32)
        size = tl.where(damping > 0.0, damping * tl.where(is_relative != 0, q, 1.0), 0.0)
        if WHITENED:
            mean_c = mean_of_diagonal(c_ptr, tl.where(starts, 0, p), rows)
            mean_k = mean_of_diagonal(k_ptr, tl.where(starts, 0, d), cols)
            weight_c = tl.sqrt(size) * tl.where(starts, stored, mean_k)
            weight_k = tl.sqrt(size) * tl.where(starts, stored, mean_c)
        else:
            count = tl.where(starts, 0, tl.where(damping > 0.0, num_parts, 0))
            square_c = sum_of_parts(squares_ptr + (num_blocks + block) * num_parts, count)
            square_k = sum_of_parts(squares_ptr + (2 * num_blocks + block) * num_parts, count)
            weight_c = size * tl.where(starts, d * stored * stored, square_k)
            weight_k = size * tl.where(starts, p * stored * stored, square_c)
        is_left = is_idle & (follows != 0)
        tl.store(weights_ptr + 4 * block, weight_c)
        tl.store(weights_ptr + 4 * block + 1, weight_k)
        tl.store(weights_ptr + 4 * block + 2, tl.where(is_left, float("nan"), 0.5 * gamma))
        tl.store(weights_ptr + 4 * block + 3, q)
    if starts:
        residual_c_ptr += block * rows * rows
        residual_k_ptr += block * cols * cols
        write_identity(c_ptr, residual_c_ptr, scale, p, rows, part, num_programs, ROUNDING)
        write_identity(k_ptr, residual_k_ptr, scale, d, cols, part, num_programs, ROUNDING)


@triton.jit
def commit_block(ok, block, ok_ptr, curvature_ptr, weights_ptr, follows):
    """Write `ok` of a block, and the new q if it is updated. A block is idle where `kron_start_kernel` wrote NaN."""
    half_gamma = tl.load(weights_ptr + (4 * block + 2) * follows, mask=follows != 0, other=0.0)
    q = tl.load(weights_ptr + (4 * block + 3) * follows, mask=follows != 0, other=0.0)
    tl.store(ok_ptr + block, ok | (half_gamma != half_gamma))
    tl.store(curvature_ptr + block * follows, q, mask=ok & (follows != 0))


# ---- configuration -----------------------------------------------------------------------------------------------


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that `make_start` can launch."""
    arguments = ("*bf16", "*bf16", "*i16", "*i16", *("*fp32",) * 4, *("i32",) * 7, *("fp32",) * 3, *("i32",) * 3)
    for whitened in (True, False):
        for rounding in ("compensated", "nearest"):
            yield Configuration(kron_start_kernel, arguments, (whitened, rounding), NUM_WARPS, 1, kind="irregular")


# ---- launcher ----------------------------------------------------------------------------------------------------


def make_start(
    work: FactorWorkspace,
    squares: Tensor,  # [1 or 3, L, partial sums], FP32: what `kron_gather` returned
    sides: tuple[int, int],  # p and d, without padding
    found_inf: Tensor | None,  # one element
    options: FactorOptions,
) -> None:
    """Write `work.weights`, and the factors of the blocks that start now."""
    (c, k), follows = work.factors, work.curvature is not None
    may_start = follows and options.factor_init == "gradient"
    num_blocks, num_programs = len(c), num_start_programs(*sides) if may_start else 1
    rounding = "nearest" if work.residuals is None else effective_rounding(c.dtype, "compensated")
    launch(
        kron_start_kernel,
        num_blocks * num_programs,
        (
            *(c, k, *(work.residuals or (c, k)), squares, squares if work.curvature is None else work.curvature),
            *(on_device(squares.device, found_inf, 0.0), work.weights),
        ),
        (
            *(num_blocks, squares.shape[-1], num_programs),
            *(*sides, c.shape[-1] // PADDING, k.shape[-1] // PADDING),
            *map(float, (options.batch_size, options.damping, options.gamma)),
            *map(int, (follows, options.relative_damping and follows, may_start)),
        ),
        (options.direction == "whitened", rounding),
        NUM_WARPS,
    )
