"""`kron_gather` in C++: bitwise comparison of gathered blocks, and sums of their squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.calls.cpu import needs_cpp
from tests.calls.kron import LAYOUTS, PLACES, assert_memory_around_blocks_is_untouched
from tests.calls.operators import call
from tests.calls.optimizers import gradients
from tests.calls.tensors import BF16, FP16, FP32, FP64, fp64, same_bits
from tests.calls.tolerances import assert_near, one_step, tolerance
from tests.cpp.calls import cpp_batch
from tests.cpp.kron_batches import with_examples

pytestmark = needs_cpp


@with_examples
def test_gather_returns_the_scaled_blocks_bitwise_and_their_sums_of_squares(batch, run):
    """Scales are powers of two, so only the conversion to the dtype of G rounds."""
    t = batch.tensors()
    batch.gather(t, run)
    factor = (-1 if batch.maximize else 1) / (batch.grad_scale or 1)
    assert same_bits(t.grad, torch.stack([(x.float() * factor).to(batch.matmul) for x in batch.blocks(t.grads)]))
    damps_by_norms = batch.all_options["damping"] and not batch.is_whitened
    squared = [t.grad, *([t.c, t.k] if damps_by_norms else [])]
    assert t.squares.dtype == FP32 and t.squares.shape[2] == -(-max(batch.rows, batch.cols) // 64)
    np.testing.assert_allclose(
        fp64(t.squares).sum(-1), [(fp64(x) ** 2).sum((1, 2)) for x in squared], rtol=tolerance("an element", FP32)
    )
    assert_memory_around_blocks_is_untouched(batch, t)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP16, FP64], ids=str)
def test_gradients_of_convolutions_are_gathered_whatever_their_strides(dtype, channels_last):
    grad = gradients([(6, 5, 3, 2)], 0, dtype)[0]
    grad = grad.to(memory_format=torch.channels_last) if channels_last else grad
    arguments = ([grad], [0, 2, 0, 3], 3, 10, [], None, FP32, False)
    both = [call(backend, "kron_gather", *arguments)[0] for backend in ("cpp", "eager")]
    assert same_bits(*both) and both[0].shape == (6, 3, 10)


def test_gradients_may_have_several_dtypes_and_are_scaled():
    batch = cpp_batch(17, 13, PLACES[3], LAYOUTS, grad_scale=3.0, maximize=True)
    gathered = []
    for dtypes in ((FP32, BF16, FP64), (FP32,) * 3):
        t = batch.tensors()
        narrow = [x.to(dtype) for x, dtype in zip(t.grads, (FP32, BF16, FP16), strict=True)]
        t.grads = [x.to(dtype) for x, dtype in zip(narrow, dtypes, strict=True)]
        batch.gather(t)
        gathered.append((t.grad, t.squares))
    assert all(map(same_bits, *gathered))
    assert_near(gathered[0][0], batch.reference_grads(t), one_step(FP32))
