"""BF16 rounding of the reference, on bit patterns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.calls import reference as ref


def all_patterns_near_ties():
    """Return fp32 bit patterns around every tie between BF16 values, including infinities and NaNs."""
    upper = np.arange(0, 1 << 16, dtype=np.uint32)[:, None] << np.uint32(16)
    return (upper + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)).ravel()


def test_round_nearest_agrees_with_torch_for_ties_infinities_and_nan():
    x = all_patterns_near_ties()
    expected = torch.from_numpy(x.view(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    is_nan = np.isnan(x.view(np.float32))
    np.testing.assert_array_equal(ref.round_nearest(x)[~is_nan], expected[~is_nan])
    assert np.isnan(ref.bfloat16_value(ref.round_nearest(x)[is_nan])).all()


@pytest.mark.parametrize("value", [1.0, 1.001, -0.0123, 3e-39, 0.0, -(2.0**100)])
def test_round_stochastic_is_unbiased(value):
    x, bits = ref.float32_bits([value]), np.arange(1 << 16)
    rounded = ref.bfloat16_value(ref.round_stochastic(x, bits)).astype(np.float64)
    assert len(np.unique(rounded)) == (1 if x[0] % (1 << 16) == 0 else 2)
    assert rounded.mean() == np.float64(np.float32(value))


def test_round_stochastic_rounds_up_for_the_largest_bits_and_keeps_infinities_and_nans():
    x = ref.float32_bits([1.001, 1.001, np.inf, -np.inf])
    low = 0x10000 - int(x[0] & 0xFFFF)
    rounded = ref.bfloat16_value(ref.round_stochastic(x, [low, low - 1, 0xFFFF, 0xFFFF]))
    np.testing.assert_array_equal(rounded, np.float32([1 + 2**-7, 1, np.inf, -np.inf]))
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], dtype=np.uint32)
    assert np.isnan(ref.bfloat16_value(ref.round_stochastic(nans, [0, 0xFFFF, 1]))).all()


def test_compensated_pair_equals_the_fp32_value_bitwise():
    x = all_patterns_near_ties()
    hi, lo = ref.compensated_split(x)
    assert (hi.dtype, lo.dtype) == (np.uint16, np.int16)
    np.testing.assert_array_equal(ref.compensated_join(hi, lo), x)


def test_compensated_hi_is_the_nearest_bf16_with_ties_away_from_zero():
    x = all_patterns_near_ties()
    x = x[np.isfinite(x.view(np.float32))]
    hi, is_tie = ref.compensated_split(x)[0], x & 0xFFFF == 0x8000
    np.testing.assert_array_equal(hi[~is_tie], ref.round_nearest(x)[~is_tie])
    np.testing.assert_array_equal(hi[is_tie], (x[is_tie] >> 16) + 1)
