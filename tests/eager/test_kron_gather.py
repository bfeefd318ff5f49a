"""`kron_gather` in eager PyTorch: bitwise comparison of gathered blocks."""

from __future__ import annotations

import pytest
import torch

from tests.calls.kron import LAYOUTS, PLACES, Batch, assert_memory_around_blocks_is_untouched
from tests.calls.operators import dispatched
from tests.calls.tensors import BF16, FP32, FP64, same_bits


@pytest.mark.parametrize(("grad", "matmul"), [(FP32, FP32), (BF16, FP32), (FP32, BF16), (FP64, FP64)], ids=str)
@pytest.mark.parametrize("places", PLACES, ids=len)
def test_gather_returns_the_scaled_blocks_bitwise(grad, matmul, places):
    """The scale is a power of two, so only the conversion to the dtype of G rounds."""
    batch = Batch(5, 4, places, LAYOUTS[1:], grad=grad, matmul=matmul, grad_scale=8.0, maximize=True)
    t = batch.tensors()
    gathered, _ = batch.gather(t, dispatched("eager"))
    assert same_bits(gathered, torch.stack([x.to(matmul) / -8.0 for x in batch.blocks(t.grads)]))
    assert_memory_around_blocks_is_untouched(batch, t)
