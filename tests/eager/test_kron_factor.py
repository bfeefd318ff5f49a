"""`kron_factor` in eager PyTorch: against the FP64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rootfree_kernels.eager import common
from tests.calls.kron import Batch
from tests.calls.operators import dispatched
from tests.calls.tensors import BF16, CLIPS, FP32, FP64, fp64
from tests.calls.tolerances import assert_close, one_step
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
def test_an_update_of_the_factors_is_the_reference_s(clip, dtype, num_blocks, rows, cols, damping, gamma, alpha2):
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


def test_a_batch_that_is_worked_through_in_slices_gives_the_same_numbers(monkeypatch):
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
