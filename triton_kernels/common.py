"""Helpers of all kernels: random bits, rounding, loads and stores, tiles of a triangle, partial sums, blocks.

Arithmetic is FP32. Every rounding to BF16 is done here, by integer operations. Compiled kernels, Triton's interpreter
and `rootfree_kernels.rounding` then agree bitwise, although the interpreter truncates where a GPU rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rootfree_kernels.triton_kernels.sizes import MAX_PARTIAL_SUMS

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether `TRITON_INTERPRET=1` was set when this module was imported. Kernels then run on CPU tensors, slowly."""

_INTERPRETED = tl.constexpr(INTERPRETED)

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
"""Dtypes that kernels read and write. FP64 is left to eager PyTorch."""


# ---- random bits, bitwise equal to those of rootfree_kernels.rounding --------------------------------------------


@triton.jit
def mix(x):
    """Return a hash of uint32 `x`."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_key(seed, step, slot: tl.constexpr):
    """Return the uint32 key of a block or tensor, from its int32 seed and its step, an int64 of which the
    lower 32 bits count."""
    mixed = mix(seed.to(tl.uint32, bitcast=True) ^ step.to(tl.int32).to(tl.uint32, bitcast=True))
    return mix(mixed + ((slot * 0x9E3779B9) & 0xFFFFFFFF))


@triton.jit
def random_bits(key, index):
    """Return 16 random bits for each element. `index` is its row-major int32 index in its block or tensor."""
    return mix(key ^ index.to(tl.uint32, bitcast=True)) >> 16


# ---- BF16 --------------------------------------------------------------------------------------------------------


@triton.jit
def _upper_half(pattern):
    """Return the BF16 whose bits are the upper half of uint32 `pattern`."""
    return (pattern >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_nearest(x, DTYPE: tl.constexpr):
    """Return FP32 `x` in DTYPE, rounded half to even. NaN stays NaN."""
    if tl.bfloat16 == DTYPE:
        pattern = x.to(tl.uint32, bitcast=True)
        rounded = pattern + (0x7FFF + ((pattern >> 16) & 1))
        return _upper_half(tl.where(x == x, rounded, 0x7FC00000))
    return x.to(DTYPE)


@triton.jit
def round_stochastic(x, bits):
    """Return BF16 of finite FP32 `x`: add 16 random bits below the mantissa and truncate."""
    return _upper_half(x.to(tl.uint32, bitcast=True) + bits)


@triton.jit
def split_compensated(x):
    """Return FP32 `x` as (hi BF16, lo int16), which together are `x` bitwise. `hi` rounds ties away from zero."""
    pattern = x.to(tl.int32, bitcast=True)
    hi = (pattern + 0x8000) >> 16
    lo = (pattern - (hi << 16)).to(tl.int16)
    hi = tl.where(x == x, hi << 16, 0x7FC00000).to(tl.uint32, bitcast=True)
    return _upper_half(hi), lo


@triton.jit
def join_compensated(hi, lo):
    """Return the FP32 value of a compensated pair.

    A user may have set `hi` to 0. A negative `lo`, left over from another value, would then make NaN and is dropped.
    """
    pattern = hi.to(tl.uint16, bitcast=True).to(tl.int32) << 16
    lo = lo.to(tl.int32)
    lo = tl.where((pattern & 0x7FFFFFFF) == 0, tl.maximum(lo, 0), lo)
    return (pattern + lo).to(tl.float32, bitcast=True)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Return the pointer to an address from a table, and promise that it is aligned to VECTOR elements.

    The compiler knows nothing about the alignment of an address that a kernel loads.
    """
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), VECTOR * DTYPE.primitive_bitwidth // 8)


@triton.jit
def element_of(address, start, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Return the pointer to element `start` of the tensor at an address: see `pointer_to`."""
    return pointer_to(address + start * (DTYPE.primitive_bitwidth // 8), DTYPE, VECTOR)


@triton.jit
def load_masked(ptr, mask):
    """Return `tl.load(ptr)`, with 0 where `mask` is False. None means no mask, which would prevent 128-bit accesses."""
    if mask is None:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=mask, other=0)


@triton.jit
def load_stored(value_ptr, residual_ptr, offsets, mask, ROUNDING: tl.constexpr):
    """Return the FP32 value of a stored tensor. `residual_ptr` is read only if ROUNDING is "compensated"."""
    value = load_masked(value_ptr + offsets, mask)
    if ROUNDING == "compensated":
        return join_compensated(value, load_masked(residual_ptr + offsets, mask))
    return value.to(tl.float32)


@triton.jit
def store_rounded(x, value_ptr, residual_ptr, offsets, mask, key, index, ROUNDING: tl.constexpr):
    """Store FP32 `x` in the dtype of `value_ptr`. ROUNDING is "nearest", or for BF16 "stochastic" or "compensated"."""
    if ROUNDING == "compensated":
        hi, lo = split_compensated(x)
        tl.store(value_ptr + offsets, hi, mask=mask)
        tl.store(residual_ptr + offsets, lo, mask=mask)
    elif ROUNDING == "stochastic":
        tl.store(value_ptr + offsets, round_stochastic(x, random_bits(key, index)), mask=mask)
    else:
        tl.store(value_ptr + offsets, round_nearest(x, value_ptr.dtype.element_ty), mask=mask)


def effective_rounding(dtype: torch.dtype, rounding: str) -> str:
    """Return how a kernel rounds to `dtype`: BF16 as asked for, every other dtype to nearest."""
    return rounding if dtype == torch.bfloat16 else "nearest"


# ---- values that are not finite ----------------------------------------------------------------------------------


@triton.jit
def is_finite(x):
    """Return whether FP32 `x` is neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def only_if(flag, mask):
    """Return `mask` if the scalar `flag` is True, otherwise False everywhere."""
    if _INTERPRETED:  # the interpreter turns a broadcast comparison into integers
        return tl.where(flag, mask, False)
    return mask & flag


# ---- products ----------------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc):
    """Return acc + a·b in FP32. FP32 operands are never rounded to TF32.

    Triton's interpreter multiplies the bit patterns of BF16. It gets FP32 operands instead, which hold BF16 exactly.
    """
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def triangle_tile(t):
    """Return (row, column), column ≤ row, of tile `t` of a lower triangle whose tiles are counted row by row."""
    row = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > t, row - 1, row)  # the square root may be off by a rounding
    row = tl.where((row + 1) * (row + 2) // 2 <= t, row + 1, row)
    return row, t - row * (row + 1) // 2


# ---- partial sums ------------------------------------------------------------------------------------------------

_PIECE = tl.constexpr(1024)
"""Elements that `sum_of_parts` loads at once. They hold all partial sums of a gather, and up to n = 5632 those of the
44 · 45 / 2 tiles of a side."""


@triton.jit
def sum_of_parts(x_ptr, count):
    """Return the sum of `count` FP32 elements, always added in the same order."""
    index = tl.arange(0, _PIECE)
    total = tl.zeros((_PIECE,), dtype=tl.float32)
    for start in range(0, count, _PIECE):
        total += tl.load(x_ptr + start + index, mask=start + index < count, other=0.0)
    return tl.sum(total)


# ---- blocks of weights -------------------------------------------------------------------------------------------

_MAX_PARTS = tl.constexpr(MAX_PARTIAL_SUMS)


@triton.jit
def block_pointers(entry_ptr, row, col, i, j, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return pointers to (row + i, col + j) of the block whose address and strides are at `entry_ptr`."""
    ptr = tl.load(entry_ptr).to(tl.pointer_type(DTYPE))
    row_stride, col_stride = tl.load(entry_ptr + 1), tl.load(entry_ptr + 2)
    if ALIGNED:  # the compiler knows nothing about the alignment of values that are loaded from a table
        ptr = tl.multiple_of(ptr, 16) + tl.multiple_of(row * row_stride, 8) + col
        return ptr + (i * tl.multiple_of(row_stride.to(tl.int32), 8) + j)
    return ptr + (row + i).to(tl.int64) * row_stride + (col + j).to(tl.int64) * col_stride


@triton.jit
def block_is_stepped(squares_ptr, ok_ptr, found_inf_ptr, block, ok_stride, num_parts):
    """Return whether a block takes a step: ‖G‖ is finite, its factors were updated, and no overflow was found.

    `squares_ptr` holds the partial sums of G² [L, num_parts].
    """
    part = tl.arange(0, _MAX_PARTS)
    square = tl.sum(tl.load(squares_ptr + block * num_parts + part, mask=part < num_parts, other=0.0))
    return is_finite(square) & tl.load(ok_ptr + block * ok_stride) & (tl.load(found_inf_ptr) == 0.0)


@triton.jit
def count_program(counter_ptr, skipped_ptr, block, left_out, num_programs):
    """Count a finished program of a block. `left_out` is 1 if it left elements out, otherwise 0.

    The last program adds 1 to `skipped` if any has, and sets the counter back to 0, so that a CUDA graph can replay the
    launch. The upper half of a counter holds how many programs left elements out.
    """
    before = tl.atomic_add(counter_ptr + block, (left_out.to(tl.int64) << 32) + 1, sem="relaxed")
    if (before & 0xFFFFFFFF) == num_programs - 1:
        tl.store(counter_ptr + block, 0)
        tl.store(skipped_ptr + block, tl.load(skipped_ptr + block) + ((before >> 32) + left_out > 0).to(tl.int32))
