"""CCᵀ and KKᵀ in Triton."""

from __future__ import annotations

import pytest

from tests.calls.device import kernel_test
from tests.calls.tensors import same_bits
from tests.triton.calls import triton_batch

pytestmark = kernel_test


@pytest.mark.parametrize(("rows", "cols"), [(17, 130), (136, 64)])
def test_recomputed_products_are_bitwise_equal_to_those_of_an_update(rows, cols):
    """A resumed run recomputes products, so it continues bitwise."""
    batch = triton_batch(rows, cols, rounding="stochastic")
    t = batch.tensors()
    batch.update(t)
    for actual, expected in zip(batch.make_products(t), (t.p_c, t.p_k), strict=True):
        assert same_bits(actual, expected)
