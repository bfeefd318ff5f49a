"""`kron_factor` in Triton: comparison with the FP64 reference, and norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given

from tests.calls.device import DEVICE, kernel_test, module_of
from tests.calls.kron import MIXED, ROOT_FREE, THREE, WHITENED
from tests.calls.operators import through
from tests.calls.tensors import BF16, FP32, ROUNDINGS, fp64, same_bits
from tests.calls.tolerances import assert_near, one_step, tolerance
from tests.eager.batches import assert_factors_are
from tests.triton.calls import triton_batch
from tests.triton.kron_batches import (
    ALIGNED,
    ANY_BATCH,
    BATCHES,
    CALLS,
    FACTOR_DTYPES,
    LARGE,
    PER_PROGRAM,
    STACKED,
    elements_per_program,
)

pytestmark = kernel_test


@given(BATCHES, CALLS, PER_PROGRAM)
@example(LARGE, through("triton"), 256)
@example(ALIGNED, through("triton"), 1 << 15)
@ANY_BATCH
def test_factor_update_matches_the_reference(batch, run, numbers):
    t = batch.tensors()
    expected, allowed = batch.reference_update(t), one_step(products=batch.matmul)
    with elements_per_program(numbers):
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
def test_bf16_updates_of_wide_factors_match_the_reference(clip, options, norm):
    """Compare C′ − C. Compensated pairs hold FP32 values, so small changes are visible."""
    batch = triton_batch(136, 70, rounding="compensated", clip=clip, options={"riemannian_momentum": 0.1, **options})
    t = batch.tensors()
    (state,), (expected,) = batch.reference_states(t), batch.reference_update(t)
    batch.update(t)
    for side, name in (("c", "C"), ("k", "K")):
        old, new, m = getattr(state, name), getattr(expected, name), getattr(expected, f"m_{name}")
        assert (np.linalg.norm(m) > 1) == (norm == "above 1")
        assert_near(t.factor(side) - old, [new - old], one_step(products=BF16))


# ---- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [WHITENED, ROOT_FREE, *MIXED], ids=str)
def test_updates_of_every_rule_match_the_reference(rule):
    """One of the three blocks gets its first gradient. With 256 elements per program, several programs process it."""
    batch = triton_batch(13, 16, THREE, dtype=FACTOR_DTYPES[0], rule=rule)
    t = batch.tensors()
    expected = batch.reference_update(t)
    with elements_per_program(256):
        assert batch.update(t).all()
    assert_factors_are(t, expected, one_step(products=batch.matmul))
    if batch.follows_curvature:
        assert_near(fp64(t.curvature), [state.curvature for state in expected], one_step(FP32, products=batch.matmul))


@pytest.mark.parametrize("rule", [WHITENED, ROOT_FREE], ids=str)
@pytest.mark.parametrize("seed", [0, 1], ids=["first gradient", "later gradient"])
def test_bf16_updates_of_wide_blocks_with_the_recipe_match_the_reference(rule, seed):
    """Blocks have several tiles, so most steps of the inner product load different tiles of C and m."""
    rest = {"rule": rule, "options": {"damping": 1e-3, "batch_size": 1.0}, "seed": seed}
    batch = triton_batch(136, 70, rounding="compensated", clip="row_sum", **rest)
    t = batch.tensors()
    expected = batch.reference_update(t)
    batch.update(t, through("triton"))
    assert_factors_are(t, expected, one_step(products=BF16))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("sides", [(17, 130), (64, 24)], ids=str)
def test_whitened_factors_are_rounded_as_in_eager_pytorch_and_stay_symmetric(sides, rounding):
    """m' = -I/4, so C' = C(1 + 2^-8) is rounded only once. The order of summation has no effect."""
    batch = triton_batch(*sides, clip="none", exact="rounding", rounding=rounding, rule={"direction": "whitened"})
    found = []
    for backend in ("triton", "eager"):
        t = batch.tensors()
        generator = torch.Generator().manual_seed(0)
        for factor in (t.c, t.k):
            values = torch.randint(128, 256, factor.shape, generator=generator) / 128
            factor.copy_(values.tril() + values.tril(-1).mT)
        old = t.copies()
        batch.update(t, through(backend))
        found.append(t)
    for name in ("c", "k", "m_c", "m_k", "lo_c", "lo_k"):
        actual, expected = (getattr(t, name) for t in found)
        if actual is not None:
            assert same_bits(actual, expected), name
            assert same_bits(actual, actual.mT), name
    moved = (found[0].c != old["c 0"]).float().mean()
    assert 0.1 < moved < 0.9 if rounding == "stochastic" else moved > 0 or rounding == "compensated"


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_whitened_factors_stay_symmetric_through_several_updates(rounding):
    batch = triton_batch(11, 8, STACKED, rounding=rounding, clip="row_sum", rule=WHITENED)
    t = batch.tensors()
    for _ in range(2):
        batch.update(t)
    for factor in (t.c, t.k, t.m_c, t.m_k, t.lo_c, t.lo_k):
        assert factor is None or same_bits(factor, factor.mT)


@pytest.mark.parametrize("rule", [WHITENED, ROOT_FREE], ids=str)
def test_zero_gradient_keeps_factors_and_overflow_is_not_ok(rule):
    batch = triton_batch(6, 5, ((0, 4, 0, 1),), dtype=FACTOR_DTYPES[0], clip="none", rule=rule)
    t = batch.tensors()
    gradients = batch.blocks(t.grads)
    gradients[1].zero_()
    gradients[2][0, 0] = 1e30
    gradients[3].zero_()
    before = t.copies()
    assert batch.update(t).tolist() == [True, True, False, True]
    for name in ("c", "k", "m_c", "m_k", "curvature"):
        same = [torch.equal(x, y) for x, y in zip(getattr(t, name), before[f"{name} 0"], strict=True)]
        assert same == [False, True, True, True], name


# ---- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "p", "d"), [(128, 1040, 8), (64, 64, 1088), (128, 72, 136)])
def test_norms_are_the_largest_row_sums_or_infinite(block, p, d):
    """Partial sums are [L, tiles, n]. One block is finite, one has a NaN, one has an infinite part, and one is 0."""
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
def test_a_row_sum_that_is_nan_is_not_lost(side):
    """The NaN is in the last row of a block with several tiles. The other block is updated."""
    batch = triton_batch(136, 72, STACKED, clip="row_sum")
    was, t = batch.tensors(), batch.tensors()
    for each in (was, t):
        getattr(each, side)[0, -1, -1] = torch.nan
    assert batch.update(t).tolist() == [False, True]
    for name in ("c", "k", "m_c", "m_k"):
        assert [same_bits(*pair) for pair in zip(getattr(t, name), getattr(was, name), strict=True)] == [True, False]
