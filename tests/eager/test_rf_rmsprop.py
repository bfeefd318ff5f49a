"""The diagonal step in eager PyTorch: comparison with the FP64 reference, and chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rootfree_kernels.eager.rf_rmsprop import chunks
from tests.calls.operators import dispatched
from tests.calls.rf_rmsprop import Call, assert_equal, assert_matches_reference, copied
from tests.calls.tensors import BF16, FP16, FP32, FP64, ROUNDINGS, assert_memory_around_is_untouched


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("layout", ["whole", "transposed", "every other"])
def test_step_matches_the_reference(dtype, rounding, layout):
    state = {FP64: FP64, BF16: BF16}.get(dtype, FP32)
    kinds = (dtype, dtype, state, state, rounding, rounding)
    call = Call([(), (1031,), (17, 130), (6, 5, 3, 7)], (layout,), *kinds, grad_scale=3.0)
    lists, memory = call.tensors()
    before = copied(lists)
    call.run(lists, dispatched("eager"))
    assert_matches_reference(call, lists, before)
    assert_equal({name: lists[name] for name in ("grad", "skipped")}, {n: before[n] for n in ("grad", "skipped")})
    assert_memory_around_is_untouched(memory)


@given(st.lists(st.integers(0, 700_000), max_size=12))
@settings(max_examples=50, deadline=None)
def test_chunks_cover_the_list_in_order_and_stay_small(sizes):
    tensors = [torch.empty(0).expand(0) if not n else torch.empty(1).expand(n) for n in sizes]
    slices = list(chunks(tensors))
    assert [t for piece in slices for t in range(len(sizes))[piece]] == list(range(len(sizes)))
    assert all(len(sizes[p]) == 1 or sum(sizes[p]) <= 1 << 20 for p in slices)
