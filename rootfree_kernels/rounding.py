"""Round FP32 values to BF16: stochastic, compensated or nearest.

A step moves a diagonal entry of an n × n factor by about β₂/√n. If that is less than half a BF16 unit, 2e-3 below 1,
rounding to nearest does not change the entry at all. How a value is rounded is therefore part of the method.

=============  ==============  ======================================================================================
mode           bytes           what is stored for each element
=============  ==============  ======================================================================================
`stochastic`   2               BF16; rounded up with a probability equal to the remainder, so right on average
`compensated`  2 + 2           BF16 `hi` and an int16 remainder `lo`: together bitwise the FP32 value
`nearest`      2               BF16, round half to even, as in the paper; kept for comparison
=============  ==============  ======================================================================================

Random bits come from a counter and never from a generator. They are a function of (seed, step, slot, element) that
every backend computes with the same result, in 32-bit wrap-around arithmetic:

    mix(x)  = x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16    (logical shifts)
    key     = mix(mix(seed ^ step) + slot · 0x9E3779B9)
    bits(i) = mix(key ^ i) >> 16          i: row-major index of the element in its block or tensor

`seed` belongs to one block or tensor (see `block_seed`). `step` is taken modulo 2³². `slot` distinguishes the tensors
that a step rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

ROUNDINGS = ("stochastic", "compensated", "nearest")

SLOT_FACTOR_C, SLOT_FACTOR_K, SLOT_SQUARE, SLOT_WEIGHT = range(4)
_GOLDEN = 0x9E3779B9


def signed(value: int) -> int:
    """Return the int32 with the same 32 bits."""
    return (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def _mix_int(value: int) -> int:
    """Return `mix` of a Python integer."""
    value &= 0xFFFFFFFF
    value = ((value ^ value >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    value = ((value ^ value >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return value ^ value >> 16


def _mix(x: Tensor) -> Tensor:
    """Apply `mix` to an int32 tensor, in place."""
    x = _mix_but_last_shift(x)
    x ^= (x >> 16) & 0xFFFF
    return x


def _mix_but_last_shift(x: Tensor) -> Tensor:
    """Apply `mix` without its last step, in place. The masks make the arithmetic shifts of int32 logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= signed(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= signed(0x846CA68B)
    return x


def _upper_half_of_mix(x: Tensor) -> Tensor:
    """Return mix(x) >> 16 of an int32 tensor, in place: 0 … 65535. The last step of `mix` keeps these bits."""
    return _mix_but_last_shift(x).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def block_seed(seed: int, param_index: int, block_index: int) -> int:
    """Return the int32 seed of one block of one parameter."""
    return signed(_mix_int(_mix_int(_mix_int(seed) ^ param_index) ^ block_index))


def keys(seeds: Tensor, steps: Tensor, slot: int) -> Tensor:
    """Return the keys [L], int32, of L blocks.

    `seeds` [L] are int32. `steps` [L] or 0-d are whole numbers of any dtype, of which the lower 32 bits count.
    """
    steps = steps.to(torch.int64)  # a float beyond 2³¹ has no int32
    key = _mix(seeds ^ steps.to(device=seeds.device, dtype=torch.int32, non_blocking=True))
    key += signed(slot * _GOLDEN)
    return _mix(key)


@dataclass(frozen=True)
class BlockBits:
    """Draw 16 random bits for each of `numel` elements of L blocks: int32 [L, numel], 0 … 65535."""

    seeds: Tensor
    steps: Tensor
    slot: int
    numel: int

    def __call__(self) -> Tensor:
        key = keys(self.seeds, self.steps, self.slot)
        index = torch.arange(self.numel, dtype=torch.int32, device=key.device)
        return _upper_half_of_mix(key.unsqueeze(1) ^ index)


@dataclass(frozen=True)
class SymmetricBits(BlockBits):
    """Draw bits as `BlockBits` does for L symmetric matrices of `numel` elements: int32 [L, n, n].

    Both halves of a matrix get the bits of the lower one, so that it stays symmetric.
    """

    def __call__(self) -> Tensor:
        size = isqrt(self.numel)
        lower = super().__call__().view(-1, size, size).tril_()
        return lower + lower.tril(-1).mT


@lru_cache(maxsize=256)
def lengths_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `sizes` as a tensor. It is cached, so that it is copied to the device only once."""
    return torch.tensor(sizes, device=device)


@dataclass(frozen=True)
class RaggedBits:
    """Draw random bits as `BlockBits` does, for L concatenated tensors of `sizes` elements: int32 [sum(sizes)]."""

    seeds: Tensor
    steps: Tensor
    slot: int
    sizes: Sequence[int]

    def __call__(self) -> Tensor:
        key = keys(self.seeds, self.steps, self.slot)
        total = sum(self.sizes)
        lengths = lengths_of(tuple(self.sizes), key.device)
        owner = torch.repeat_interleave(lengths, output_size=total)
        starts = lengths.cumsum(0) - lengths
        index = (torch.arange(total, device=key.device) - starts[owner]).to(torch.int32)
        return _upper_half_of_mix(key[owner] ^ index)


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """Round finite FP32 `x` to BF16: add `bits` (int32, 0 … 65535, same shape) below the mantissa and truncate."""
    pattern = x.contiguous().view(torch.int32) + bits
    return pattern.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def split_compensated(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split FP32 `x` into (hi BF16, lo int16), so that `join_compensated(hi, lo)` is bitwise `x` if `x` is finite.

    `hi` rounds ties away from zero, so that `lo` fits into int16. It is NaN where `x` is.
    """
    pattern = x.contiguous().view(torch.int32)
    hi = (pattern + 0x8000) >> 16
    lo = pattern - (hi << 16)
    value = torch.where(x.isnan(), torch.nan, hi.to(torch.int16).view(torch.bfloat16))
    return value, lo.to(torch.int16)


def join_compensated(hi: Tensor, lo: Tensor) -> Tensor:
    """Return the FP32 value of a compensated pair (hi BF16, lo int16).

    A user may have changed `hi` since, for example masked a weight. The value is then `hi` to within a rounding. A `hi`
    of ±0 has a `lo` of 0 or more. A negative `lo` is left over from another weight and dropped: it would make a NaN.
    """
    lo = torch.where(hi == 0, lo.clamp(min=0), lo)
    pattern = (hi.contiguous().view(torch.int16).to(torch.int32) << 16) + lo
    return pattern.view(torch.float32)
