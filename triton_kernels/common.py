"""What the kernels share: random bits, rounding, stored values, the walk over a triangle of tiles, partial sums.

Arithmetic is FP32. Every rounding to BF16 is done here, by integer operations, so that compiled kernels, Triton's
interpreter and `rootfree_kernels.rounding` agree to the bit (the interpreter truncates where a GPU rounds).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether `TRITON_INTERPRET=1` was set when this module was imported: kernels then run on CPU tensors, slowly."""

_INTERPRETED = tl.constexpr(INTERPRETED)

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
"""Dtypes of what kernels read and write. FP64 is left to eager PyTorch."""


# ---- random bits, to the bit those of rootfree_kernels.rounding --------------------------------------------------


@triton.jit
def mix(x):
    """A hash of uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_key(seed, step, slot: tl.constexpr):
    """The uint32 key of one block or tensor, from its int32 seed and its step (any dtype, a whole number)."""
    mixed = mix(seed.to(tl.uint32, bitcast=True) ^ step.to(tl.int32).to(tl.uint32, bitcast=True))
    return mix(mixed + ((slot * 0x9E3779B9) & 0xFFFFFFFF))


@triton.jit
def random_bits(key, index):
    """16 random bits for each element; `index` is its row-major int32 index in its block or tensor."""
    return mix(key ^ index.to(tl.uint32, bitcast=True)) >> 16


# ---- BF16 --------------------------------------------------------------------------------------------------------


@triton.jit
def _upper_half(pattern):
    return (pattern >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_nearest(x, DTYPE: tl.constexpr):
    """FP32 `x` in DTYPE, rounded half to even; NaN stays NaN."""
    if tl.bfloat16 == DTYPE:
        pattern = x.to(tl.uint32, bitcast=True)
        rounded = pattern + (0x7FFF + ((pattern >> 16) & 1))
        return _upper_half(tl.where(x == x, rounded, 0x7FC00000))
    return x.to(DTYPE)


@triton.jit
def round_stochastic(x, bits):
    """BF16 of finite FP32 `x`: add 16 random bits below the mantissa and truncate."""
    return _upper_half(x.to(tl.uint32, bitcast=True) + bits)


@triton.jit
def split_compensated(x):
    """(hi BF16, lo int16) of FP32 `x`: `hi` rounds ties away from zero, the pair is `x` bit for bit."""
    pattern = x.to(tl.int32, bitcast=True)
    hi = (pattern + 0x8000) >> 16
    lo = (pattern - (hi << 16)).to(tl.int16)
    hi = tl.where(x == x, hi << 16, 0x7FC00000).to(tl.uint32, bitcast=True)
    return _upper_half(hi), lo


@triton.jit
def join_compensated(hi, lo):
    """The FP32 value of a compensated pair; a negative remainder of ±0, left over from another value, is dropped."""
    pattern = hi.to(tl.uint16, bitcast=True).to(tl.int32) << 16
    lo = lo.to(tl.int32)
    lo = tl.where((pattern & 0x7FFFFFFF) == 0, tl.maximum(lo, 0), lo)
    return (pattern + lo).to(tl.float32, bitcast=True)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The pointer to an address out of a table, which carries no alignment: VECTOR numbers are promised to have it."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), VECTOR * DTYPE.primitive_bitwidth // 8)


@triton.jit
def load_masked(ptr, mask):
    """`tl.load`, 0 where `mask` is False. A mask of None reads all: no mask is in the way of 128-bit accesses then."""
    if mask is None:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=mask, other=0)


@triton.jit
def load_stored(value_ptr, residual_ptr, offsets, mask, ROUNDING: tl.constexpr):
    """The FP32 value of a stored tensor; `residual_ptr` is read only where ROUNDING is "compensated"."""
    value = load_masked(value_ptr + offsets, mask)
    if ROUNDING == "compensated":
        return join_compensated(value, load_masked(residual_ptr + offsets, mask))
    return value.to(tl.float32)


@triton.jit
def store_rounded(x, value_ptr, residual_ptr, offsets, mask, key, index, ROUNDING: tl.constexpr):
    """Store FP32 `x` as its dtype and ROUNDING want: "stochastic", "compensated" (both BF16 alone) or "nearest"."""
    if ROUNDING == "compensated":
        hi, lo = split_compensated(x)
        tl.store(value_ptr + offsets, hi, mask=mask)
        tl.store(residual_ptr + offsets, lo, mask=mask)
    elif ROUNDING == "stochastic":
        tl.store(value_ptr + offsets, round_stochastic(x, random_bits(key, index)), mask=mask)
    else:
        tl.store(value_ptr + offsets, round_nearest(x, value_ptr.dtype.element_ty), mask=mask)


def effective_rounding(dtype: torch.dtype, rounding: str) -> str:
    """The mode in which a kernel writes `dtype`: only BF16 knows modes, all else is rounded to nearest."""
    return rounding if dtype == torch.bfloat16 else "nearest"


# ---- numbers that are not finite ---------------------------------------------------------------------------------


@triton.jit
def is_finite(x):
    """Whether FP32 `x` is neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def only_if(flag, mask):
    """`mask` where the scalar `flag` holds, nowhere otherwise."""
    if _INTERPRETED:  # which makes numbers of a comparison that it broadcasts
        return tl.where(flag, mask, False)
    return mask & flag


# ---- products ----------------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc):
    """Return acc + a·b in FP32; FP32 operands are never rounded to TF32.

    Triton's interpreter multiplies the bit patterns of BF16, so it gets FP32 operands, which hold BF16 exactly.
    """
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def triangle_tile(t):
    """(row, column), column ≤ row, of tile `t` of a lower triangle that is counted row by row."""
    row = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > t, row - 1, row)  # the square root may be off by a rounding
    row = tl.where((row + 1) * (row + 2) // 2 <= t, row + 1, row)
    return row, t - row * (row + 1) // 2


# ---- partial sums ------------------------------------------------------------------------------------------------

_PIECE = tl.constexpr(1024)
"""Numbers of `sum_of_parts` that are loaded at once: all partial sums of a gather, and up to n = 5632 those of the
44 · 45 / 2 tiles of a side."""


@triton.jit
def sum_of_parts(x_ptr, count):
    """Return Σ of `count` FP32 numbers, always in the same order."""
    index = tl.arange(0, _PIECE)
    total = tl.zeros((_PIECE,), dtype=tl.float32)
    for start in range(0, count, _PIECE):
        total += tl.load(x_ptr + start + index, mask=start + index < count, other=0.0)
    return tl.sum(total)
