"""`kron_factor` in Triton: against the FP64 reference, and norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given

from tests.calls.device import DEVICE, kernel_test, module_of
from tests.calls.operators import through
from tests.calls.tensors import BF16, FP32, same_bits
from tests.calls.tolerances import assert_near, one_step, tolerance
from tests.triton.calls import triton_batch
from tests.triton.kron_batches import (
    ALIGNED,
    ANY_BATCH,
    BATCHES,
    CALLS,
    LARGE,
    PER_PROGRAM,
    STACKED,
    numbers_per_program,
)

pytestmark = kernel_test


@given(BATCHES, CALLS, PER_PROGRAM)
@example(LARGE, through("triton"), 256)
@example(ALIGNED, through("triton"), 1 << 15)
@ANY_BATCH
def test_an_update_of_the_factors_is_the_reference_s(batch, run, numbers):
    t = batch.tensors()
    expected, allowed = batch.reference_update(t), one_step(products=batch.matmul)
    with numbers_per_program(numbers):
        ok = batch.update(t, run)
    assert ok.all() and ok.shape == (len(expected),)
    for side, name in (("c", "C"), ("k", "K")):
        factor, m, product = t.factor(side), getattr(t, f"m_{side}"), getattr(t, f"p_{side}")
        assert_near(factor, [getattr(state, name) for state in expected], allowed)
        assert_near(m, [getattr(state, f"m_{name}") for state in expected], allowed)
        assert_near(product, factor @ factor.swapaxes(1, 2), allowed)
        for symmetric in (m, product):
            assert same_bits(symmetric, symmetric.mT)


@pytest.mark.parametrize(
    ("clip", "options", "norm"),
    [
        ("frobenius", {}, "above 1"),
        ("row_sum", {}, "above 1"),
        ("none", {}, "above 1"),
        ("frobenius", {"gamma": 0.0, "batch_size": 0.01, "damping": 0.0}, "below 1"),
    ],
)
def test_bf16_moves_the_factors_of_wide_blocks_as_the_reference_does(clip, options, norm):
    """C′ − C by itself: the FP32 value of a compensated pair shows every step."""
    batch = triton_batch(136, 70, rounding="compensated", clip=clip, options={"riemannian_momentum": 0.1, **options})
    t = batch.tensors()
    (state,), (expected,) = batch.reference_states(t), batch.reference_update(t)
    batch.update(t)
    for side, name in (("c", "C"), ("k", "K")):
        old, new, m = getattr(state, name), getattr(expected, name), getattr(expected, f"m_{name}")
        assert (np.linalg.norm(m) > 1) == (norm == "above 1")
        assert_near(t.factor(side) - old, [new - old], one_step(products=BF16))


# ---- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "p", "d"), [(128, 1040, 8), (64, 64, 1088), (128, 72, 136)])
def test_norms_are_the_largest_row_sums_and_infinite_where_one_is_not_finite(block, p, d):
    """Parts are [L, tiles, n]. Of the four blocks one is finite, one has a NaN, one an infinite part, and one is 0."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand((4, -(-n // block), n), generator=generator) for n in (p, d)]
    for sums in parts:
        sums[1, -1, n := sums.shape[2] // 2] = torch.nan
        sums[2, 0, n] = torch.inf
        sums[3] = 0
    parts = [sums.to(DEVICE) for sums in parts]
    found = []
    for _ in range(2):
        norms = torch.full((4, 2), torch.nan, device=DEVICE)
        module_of("kron_norms").make_norms(*parts, norms, block)
        found.append(norms)
    expected = torch.stack([sums.double().sum(1).amax(1).nan_to_num(torch.inf, torch.inf) for sums in parts], 1)
    torch.testing.assert_close(found[0].double(), expected, rtol=tolerance("an element", FP32), atol=0)
    assert same_bits(*found)


@pytest.mark.parametrize("side", ["m_c", "m_k"])
def test_a_row_sum_that_is_nan_is_seen(side):
    """It is in the last row of a block of several tiles; the other block is updated."""
    batch = triton_batch(136, 72, STACKED, clip="row_sum")
    was, t = batch.tensors(), batch.tensors()
    for each in (was, t):
        getattr(each, side)[0, -1, -1] = torch.nan
    assert batch.update(t).tolist() == [False, True]
    for name in ("c", "k", "m_c", "m_k"):
        assert [same_bits(*pair) for pair in zip(getattr(t, name), getattr(was, name), strict=True)] == [True, False]
