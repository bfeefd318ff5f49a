"""`kron_gather` in Triton: bitwise comparison of gathered blocks, and sums of their squares."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given

from tests.calls.device import kernel_test, triton_operators
from tests.calls.kron import STATE, THREE, assert_memory_around_blocks_is_untouched, assert_same
from tests.calls.operators import through
from tests.calls.tensors import BF16, FP16, FP32, fp64, same_bits
from tests.calls.tolerances import assert_near, one_step, tolerance
from tests.triton.calls import triton_batch
from tests.triton.kron_batches import (
    ALIGNED,
    ANY_BATCH,
    BATCHES,
    CALLS,
    LARGE,
    ODD_ROWS,
    PER_PROGRAM,
    STACKED,
    elements_per_program,
)

pytestmark = kernel_test


@given(BATCHES, CALLS, PER_PROGRAM)
@example(LARGE, through("triton"), 256)
@example(ALIGNED, through("triton"), 256)
@example(ODD_ROWS, through("triton"), 256)
@example(triton_batch(5, 4, ((1, 2, 3, 3), (0, 1, 2, 2))), through("triton"), 256)
@ANY_BATCH
def test_gather_returns_the_scaled_blocks_bitwise_and_their_squared_norms(batch, run, numbers):
    """Scales are powers of two, so only the conversion to the dtype of G rounds."""
    t = batch.tensors()
    with elements_per_program(numbers):
        grad, squares = batch.gather(t, run)
    factor = (-1 if batch.maximize else 1) / (batch.grad_scale or 1)
    expected = torch.stack([(x.float() * factor).to(batch.dtype) for x in batch.blocks(t.grads)])
    assert [side % 8 for side in grad.shape[1:]] == [0, 0]
    assert (grad[:, : batch.rows, : batch.cols] == expected).all()
    assert (grad[:, batch.rows :] == 0).all() and (grad[:, :, batch.cols :] == 0).all()
    squared = [np.stack(batch.reference_grads(t)), *([fp64(t.c), fp64(t.k)] if batch.all_options["damping"] else [])]
    sums = fp64(squares).sum(-1)
    np.testing.assert_allclose(sums, [(x**2).sum((1, 2)) for x in squared], rtol=tolerance("an element", FP32))
    assert squares.shape[-1] == max(1, min(512, batch.rows * batch.cols // numbers))
    assert_memory_around_blocks_is_untouched(batch, t)


@pytest.mark.parametrize(("rows", "cols", "number"), [(8, 8, 1), (768, 768, 18), (4096, 4096, 512), (8192, 8192, 512)])
def test_a_large_block_is_gathered_by_many_programs(rows, cols, number):
    """Two blocks of 4096 × 4096 use 1024 programs. These are seven for each of an H100's 132 multiprocessors."""
    assert triton_operators.num_partial_sums(rows, cols) == number


def test_many_programs_read_every_element_once():
    """There are 138 programs. 130 of them read eight rows of G, and 133 read a share of C."""
    batch = triton_batch(1040, 8, grad=BF16)
    t = batch.tensors()
    with elements_per_program(60):
        grad, squares = batch.gather(t)
    assert same_bits(grad[0], t.grads[0].to(batch.dtype)) and squares.shape[-1] == 138
    assert squares[:, 0].count_nonzero(1).tolist() == [130, 133, 1]
    np.testing.assert_allclose(
        fp64(squares).sum((1, 2)), [(fp64(x) ** 2).sum() for x in (grad, t.c, t.k)], rtol=tolerance("an element", FP32)
    )


def test_gradients_may_have_several_dtypes():
    batch = triton_batch(17, 13, THREE)
    for dtypes in ((FP32, BF16, FP16), (torch.float64,) * 3):
        t = batch.tensors()
        mixed = [grad.to(dtype) for grad, dtype in zip(t.grads, dtypes, strict=True)]
        gathered = []
        for t.grads in (mixed, [grad.float() for grad in mixed]):
            gathered.append(batch.gather(t))
        for actual, expected in zip(*gathered, strict=True):
            assert same_bits(actual, expected)


@pytest.mark.parametrize("scale", [3.0, 2.0**20])
def test_gradients_are_unscaled_and_negated(scale):
    batch = triton_batch(17, 13, STACKED)
    t = batch.tensors()
    for grad in t.grads:
        grad.mul_(-scale)
    replace(batch, grad_scale=scale, maximize=True).run(t)
    expected = batch.run()
    for name in ("c", "k", "m_c", "m_k"):
        assert_near(getattr(t, name), fp64(getattr(expected, name)), one_step(products=BF16))
    if scale != 3.0:
        assert_same(t, expected, *STATE, "params", "buffers", "skipped")
