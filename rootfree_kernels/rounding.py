"""Rounding of FP32 values to BF16: stochastic, compensated, nearest.

A step moves a diagonal entry of an n × n factor by about β₂/√n. Where that is less than half a BF16 unit, 2e-3 below 1,
round-to-nearest leaves the entry where it is. How a value is rounded is therefore part of the method.

=============  ==============  ======================================================================================
mode           bytes a number  what is stored
=============  ==============  ======================================================================================
`stochastic`   2               BF16; rounded up with a probability equal to the remainder, so right on average
`compensated`  2 + 2           BF16 `hi` and an int16 remainder `lo`: together the FP32 value, bit for bit
`nearest`      2               BF16, round half to even; the paper's, kept for comparison
=============  ==============  ======================================================================================

Random bits come from a counter, never from a generator: they are a function of (seed, step, slot, element) that every
backend computes alike, with 32-bit wrap-around arithmetic:

    mix(x)  = x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16    (logical shifts)
    key     = mix(mix(seed ^ step) + slot · 0x9E3779B9)
    bits(i) = mix(key ^ i) >> 16          i: row-major index of the element in its block or tensor

`seed` belongs to one block or tensor (see `block_seed`), `slot` tells apart what is rounded in the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ROUNDINGS = ("stochastic", "compensated", "nearest")

SLOT_FACTOR_C, SLOT_FACTOR_K, SLOT_SQUARE, SLOT_WEIGHT = range(4)
_GOLDEN = 0x9E3779B9


def _signed(value: int) -> int:
    """The int32 with the same 32 bits."""
    return (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def _mix_int(value: int) -> int:
    """`mix` of a Python integer."""
    value &= 0xFFFFFFFF
    value = ((value ^ value >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    value = ((value ^ value >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return value ^ value >> 16


def _mix(x: Tensor) -> Tensor:
    """`mix` of an int32 tensor, in place."""
    x = _mix_but_last_shift(x)
    x ^= (x >> 16) & 0xFFFF
    return x


def _mix_but_last_shift(x: Tensor) -> Tensor:
    """`mix` without its last step, in place. Shifts of int32 are arithmetic: the mask makes them logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    return x


def _upper_half_of_mix(x: Tensor) -> Tensor:
    """mix(x) >> 16 of an int32 tensor, in place, as 0 … 65535; the last step of `mix` leaves these bits alone."""
    return _mix_but_last_shift(x).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def block_seed(seed: int, param_index: int, block_index: int) -> int:
    """The int32 seed of one block of one parameter."""
    return _signed(_mix_int(_mix_int(_mix_int(seed) ^ param_index) ^ block_index))


def keys(seeds: Tensor, steps: Tensor, slot: int) -> Tensor:
    """Keys [L], int32, of L blocks: `seeds` [L] int32, `steps` [L] or 0-d, any dtype, whole numbers."""
    key = _mix(seeds ^ steps.to(device=seeds.device, dtype=torch.int32, non_blocking=True))
    key += _signed(slot * _GOLDEN)
    return _mix(key)


@dataclass(frozen=True)
class BlockBits:
    """Draws 16 random bits for each of `numel` elements of L blocks: int32 [L, numel], 0 … 65535."""

    seeds: Tensor
    steps: Tensor
    slot: int
    numel: int

    def __call__(self) -> Tensor:
        key = keys(self.seeds, self.steps, self.slot)
        index = torch.arange(self.numel, dtype=torch.int32, device=key.device)
        return _upper_half_of_mix(key.unsqueeze(1) ^ index)


@lru_cache(maxsize=256)
def _lengths(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """`sizes` as a tensor, kept, so that it is copied to the device but once."""
    return torch.tensor(sizes, device=device)


@dataclass(frozen=True)
class RaggedBits:
    """As `BlockBits`, for L tensors of `sizes` numbers laid end to end: int32 [sum(sizes)]."""

    seeds: Tensor
    steps: Tensor
    slot: int
    sizes: Sequence[int]

    def __call__(self) -> Tensor:
        key = keys(self.seeds, self.steps, self.slot)
        total = sum(self.sizes)
        lengths = _lengths(tuple(self.sizes), key.device)
        owner = torch.repeat_interleave(lengths, output_size=total)
        starts = lengths.cumsum(0) - lengths
        index = (torch.arange(total, device=key.device) - starts[owner]).to(torch.int32)
        return _upper_half_of_mix(key[owner] ^ index)


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """BF16 of finite FP32 `x`: add `bits` (int32, 0 … 65535, same shape) below the mantissa and truncate."""
    pattern = x.contiguous().view(torch.int32) + bits
    return pattern.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def split_compensated(x: Tensor) -> tuple[Tensor, Tensor]:
    """(hi BF16, lo int16) of FP32 `x`, so that `join_compensated(hi, lo)` is `x` bit for bit where `x` is finite.

    `hi` rounds ties away from zero, so that `lo` fits; it is NaN where `x` is.
    """
    pattern = x.contiguous().view(torch.int32)
    hi = (pattern + 0x8000) >> 16
    lo = pattern - (hi << 16)
    value = torch.where(x.isnan(), torch.nan, hi.to(torch.int16).view(torch.bfloat16))
    return value, lo.to(torch.int16)


def join_compensated(hi: Tensor, lo: Tensor) -> Tensor:
    """The FP32 value of a compensated pair (hi BF16, lo int16).

    `hi` may have been changed since, a weight masked or set, say: the value is then `hi` to within a rounding. Of
    ±0 only a `lo` of 0 or more is possible; what is left of another weight there is dropped, since it would give NaN.
    """
    lo = torch.where(hi == 0, lo.clamp(min=0), lo)
    pattern = (hi.contiguous().view(torch.int16).to(torch.int32) << 16) + lo
    return pattern.view(torch.float32)
