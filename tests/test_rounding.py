"""The three rounding modes, and the random bits, which must be equal in all backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootfree_kernels import rounding as rnd
from tests.calls import reference as ref

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def mix(x: int) -> int:
    """Compute `mix` of the documentation with Python integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def bits(seed: int, step: int, slot: int, index: int) -> int:
    key = mix((mix((seed ^ step) & 0xFFFFFFFF) + slot * 0x9E3779B9) & 0xFFFFFFFF)
    return mix(key ^ index) >> 16


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4),
    st.integers(0, 2**24) | st.integers(0, 2**40),
    st.integers(0, 3),
)
def test_bits_follow_the_documented_function_of_seed_step_slot_and_element(seeds, step, slot):
    seed, steps = torch.tensor(seeds, dtype=torch.int32), torch.full((len(seeds),), step)
    drawn = rnd.BlockBits(seed, steps, slot, 9)()
    assert drawn.tolist() == [[bits(s & 0xFFFFFFFF, step, slot, i) for i in range(9)] for s in seeds]
    assert torch.equal(rnd.BlockBits(seed, steps.double(), slot, 9)(), drawn)  # whole numbers of another dtype
    sizes = [3 + n for n in range(len(seeds))]
    ragged = rnd.RaggedBits(seed, steps, slot, sizes)()
    assert ragged.tolist() == [drawn[n, i].item() for n, size in enumerate(sizes) for i in range(size)]


def test_block_seeds_differ_between_seeds_parameters_and_blocks():
    seeds = {rnd.block_seed(s, p, b) for s in range(10) for p in range(30) for b in range(30)}
    assert len(seeds) == 9000


def test_bits_are_uniform_and_do_not_repeat_from_step_to_step():
    seeds = torch.tensor([7], dtype=torch.int32)
    first, second = (rnd.BlockBits(seeds, torch.tensor([t]), 0, 1 << 18)()[0].double() for t in (0.0, 1.0))
    counts = torch.histc(first, 256, 0, 65536)
    assert ((counts - 1024) ** 2 / 1024).sum() < 400  # chi-square with 255 degrees of freedom: p ≈ 1e-8
    for x, y in ((first, second), (first[:-1], first[1:]), (first[::2], first[1::2])):
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.015  # at least 5 standard errors


@given(st.lists(finite, min_size=1, max_size=20), st.integers(0, 65535))
def test_stochastic_rounding_adds_bits_below_the_mantissa_and_truncates(values, draw):
    x = torch.tensor(values, dtype=torch.float32)
    actual = rnd.round_stochastic(x, torch.full(x.shape, draw, dtype=torch.int32))
    expected = ref.round_stochastic(x.numpy().view(np.uint32), np.full(len(values), draw, dtype=np.uint32))
    assert (actual.view(torch.int16).numpy().view(np.uint16) == expected).all()


def test_stochastic_rounding_is_unbiased():
    x = torch.full((1 << 18,), -1.0013)  # −1 minus a third of a BF16 unit
    draw = rnd.BlockBits(torch.tensor([1], dtype=torch.int32), torch.tensor([5.0]), 0, x.numel())()[0]
    mean = rnd.round_stochastic(x, draw).double().mean().item()
    assert mean == pytest.approx(-1.0013, abs=5 * 2**-7 / 2 / 512)  # 5 standard errors


@given(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=20))
def test_a_compensated_pair_equals_the_fp32_value_bitwise(values):
    x = torch.tensor(values, dtype=torch.float32)
    hi, lo = rnd.split_compensated(x)
    assert torch.equal(rnd.join_compensated(hi, lo).view(torch.int32), x.view(torch.int32))
    hi_expected, lo_expected = ref.compensated_split(x.numpy().view(np.uint32))
    assert (hi.view(torch.int16).numpy().view(np.uint16) == hi_expected).all()
    assert (lo.numpy() == lo_expected).all()


def test_values_that_bf16_holds_exactly_are_never_moved():
    x = torch.arange(-300, 300).bfloat16().float()
    for draw in (0, 1, 65535):
        rounded = rnd.round_stochastic(x, torch.full(x.shape, draw, dtype=torch.int32))
        assert torch.equal(rounded.float(), x)
    assert torch.equal(rnd.split_compensated(x)[0].float(), x)
