"""`kron_factor` in eager PyTorch, compared with the FP64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rootfree_kernels.eager import common
from tests.calls.kron import MIXED, ROOT_FREE, WHITENED, Batch
from tests.calls.operators import dispatched
from tests.calls.tensors import BF16, CLIPS, FP32, FP64, ROUNDINGS, fp64, same_bits
from tests.calls.tolerances import assert_close, assert_near, one_step
from tests.eager.batches import assert_factors_are, wide_batch


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=str)
@given(
    num_blocks=st.integers(1, 3),
    rows=st.integers(1, 17),
    cols=st.integers(1, 13),
    damping=st.sampled_from([0.0, 0.2]),
    gamma=st.sampled_from([0.0, 1.0]),
    alpha2=st.sampled_from([0.0, 0.6]),
)
@settings(max_examples=15, deadline=None)
def test_factor_update_matches_the_reference(clip, dtype, num_blocks, rows, cols, damping, gamma, alpha2):
    options = {"damping": damping, "gamma": gamma, "riemannian_momentum": alpha2}
    batch = wide_batch(num_blocks, rows, cols, dtype, clip=clip, rounding="stochastic", options=options)
    t = batch.tensors()
    expected = batch.reference_update(t)
    assert batch.update(t, dispatched("eager")).all()
    assert_factors_are(t, expected, one_step(products=dtype))


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_bf16_factors_and_products_stay_within_bf16_of_the_reference(rounding):
    batch = Batch(48, 32, ((0, 4, 0, 1),), dtype=BF16, matmul=BF16, rounding=rounding)
    t = batch.tensors()
    expected = batch.reference_update(t)
    batch.update(t, dispatched("eager"))
    assert_factors_are(t, expected, one_step(products=BF16))


def test_blocks_of_a_batch_are_independent():
    batch = wide_batch(3, 8, 6, FP64)
    t, changed = batch.tensors(), batch.tensors()
    changed.grads[0][8:16] *= 2.0
    for each in (t, changed):
        batch.run(each)
    for name in ("c", "k", "m_c", "m_k", "params", "buffers"):
        values = [getattr(x, name) for x in (t, changed)]
        blocks = [batch.blocks(x) if isinstance(x, list) else x for x in values]
        assert [torch.equal(x, y) for x, y in zip(*blocks, strict=True)] == [True, False, True], name


def test_slices_of_a_batch_give_the_same_result(monkeypatch):
    batch = wide_batch(5, 9, 7, FP64)
    whole, sliced = batch.run(), batch.tensors()
    monkeypatch.setattr(common, "CACHE_ELEMENTS", 2 * 9 * 7)
    parts = common.cache_slices(5, 9, 7, torch.device("cpu"))
    assert [len(range(5)[part]) for part in parts] == [2, 2, 1]
    batch.run(sliced)
    assert torch.equal(whole.ok, sliced.ok)
    for name in ("c", "k", "m_c", "m_k"):
        assert_close(getattr(sliced, name), fp64(getattr(whole, name)), FP64)
    for name in ("params", "buffers"):
        assert_close(getattr(sliced, name)[0], fp64(getattr(whole, name)[0]), FP64)


# ---- the recipe --------------------------------------------------------------------------------------------------

RULES = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(["root_free", "whitened"]),
        "relative_damping": st.booleans(),
        "factor_init": st.sampled_from(["identity", "gradient"]),
    }
)


@given(
    rule=RULES,
    seed=st.integers(0, 1000),
    num_blocks=st.integers(1, 3),
    rows=st.integers(1, 17),
    cols=st.integers(1, 13),
    clip=st.sampled_from(CLIPS),
    maximize=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([1.0, 7.5]),
            "beta2": st.sampled_from([0.1, 0.95]),
            "riemannian_momentum": st.sampled_from([0.0, 0.6]),
            "damping": st.sampled_from([0.0, 1e-8, 0.2]),
            "gamma": st.sampled_from([0.0, 1.0]),
        }
    ),
)
@settings(max_examples=1000, deadline=None)
def test_fp64_updates_match_the_reference_to_twelve_digits(rule, seed, num_blocks, rows, cols, clip, maximize, options):
    batch = wide_batch(
        num_blocks, rows, cols, FP64, clip=clip, seed=seed, rule=rule, options=options, maximize=maximize
    )
    t = batch.tensors()
    expected = batch.reference_update(t)
    assert batch.update(t).all()
    assert_factors_are(t, expected, 1e-12)
    if batch.follows_curvature:
        assert_near(fp64(t.curvature), [state.curvature for state in expected], 1e-12)


@pytest.mark.parametrize("rule", [WHITENED, ROOT_FREE, *MIXED], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_updates_match_the_reference_within_the_tolerance_of_their_dtype(dtype, rule):
    batch = Batch(48, 32, ((0, 6, 0, 1),), dtype=dtype, matmul=dtype, rounding="stochastic", rule=rule)
    t = batch.tensors()
    expected = batch.reference_update(t)
    batch.update(t, dispatched("eager"))
    assert_factors_are(t, expected, one_step(products=dtype))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_whitened_factors_stay_bitwise_symmetric(rounding):
    batch = Batch(19, 12, ((0, 4, 0, 1),), dtype=BF16, matmul=BF16, rounding=rounding, rule=WHITENED)
    t = batch.tensors()
    for residual in (t.lo_c, t.lo_k):
        if residual is not None:
            residual.copy_(residual.tril() + residual.tril(-1).mT)
    for _ in range(3):
        batch.update(t)
    for factor in (t.c, t.k, t.lo_c, t.lo_k):
        assert factor is None or same_bits(factor, factor.mT)


@pytest.mark.parametrize("rule", [WHITENED, ROOT_FREE], ids=str)
def test_zero_gradient_keeps_factors_and_overflow_is_not_ok(rule):
    batch = wide_batch(4, 6, 5, FP32, rule=rule)
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


def test_a_block_starts_at_its_first_gradient():
    """The gradient is a multiple of I, so C = K = q^(-1/4) I and A A^T/d = I. The first update then changes nothing."""
    rule = {**ROOT_FREE, "direction": "whitened"}
    batch = wide_batch(1, 4, 4, FP64, rule=rule, options={"damping": 0.0, "batch_size": 1.0})
    t = batch.tensors()
    t.grads[0].copy_(3.0 * torch.eye(4))
    t.m_c.zero_()
    t.m_k.zero_()
    t.curvature.zero_()
    batch.update(t)
    q = 9.0 / 4
    assert_near([fp64(t.curvature)], [q], 1e-14)
    # A = q^(-1/2) G and A A^T/d = 9/(4 q) I = I, so delta is 0.
    assert_near(fp64(t.c), [q**-0.25 * fp64(torch.eye(4))], 1e-14)


def test_no_block_starts_if_the_scaler_found_an_overflow():
    batch = wide_batch(3, 6, 5, FP32, rule=WHITENED)
    batch.found_inf = 1.0
    t = batch.tensors()
    before = t.copies()
    assert not batch.update(t).any()
    for name in ("c", "k", "m_c", "m_k", "curvature"):
        assert torch.equal(getattr(t, name), before[f"{name} 0"]), name
