"""`kron_step` in Triton: comparison with the FP64 reference, and skipped blocks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.calls.device import DEVICE, kernel_test, launches, module_of
from tests.calls.kron import (
    LAYOUTS,
    MIXED,
    ROOT_FREE,
    STATE,
    THREE,
    WHITENED,
    assert_memory_around_blocks_is_untouched,
    assert_same,
)
from tests.calls.operators import call, through
from tests.calls.tensors import BF16, FP32, fp64, same_bits
from tests.calls.tolerances import assert_near, one_step
from tests.triton.calls import triton_batch
from tests.triton.kron_batches import ALIGNED, ANY_BATCH, BATCHES, CALLS, FACTOR_DTYPES, LARGE, ODD_ROWS, STACKED

pytestmark = kernel_test


@given(BATCHES, CALLS, st.booleans(), st.booleans())
@example(LARGE, through("triton"), True, True)
@example(ALIGNED, through("triton"), True, False)
@example(ODD_ROWS, through("triton"), True, False)
@ANY_BATCH
def test_step_of_the_weights_matches_the_reference(batch, run, cached, with_ok):
    t = batch.tensors()
    batch.gather(t, run)
    if cached:
        t.p_c, t.p_k = batch.make_products(t, run)
    before, (weights, buffers) = t.copies(), batch.reference_step(t)
    ok = torch.ones(len(weights), dtype=torch.bool, device=DEVICE) if with_ok else None
    batch.step(t, ok, cached, run)
    stored = FP32 if t.residuals else batch.param
    assert_near(map(fp64, batch.blocks(t.weights())), weights, one_step(stored, products=batch.matmul))
    assert_near(map(fp64, batch.blocks(t.buffers)), buffers, one_step(batch.buffer, products=batch.matmul))
    assert_memory_around_blocks_is_untouched(batch, t)
    after = t.copies()
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert {name.split()[0] for name in changed} <= {"params", "buffers", "residuals"}


PARTS = {
    "small": triton_batch(13, 9, THREE, LAYOUTS, dtype=FACTOR_DTYPES[0], grad_scale=4.0, maximize=True),
    "aligned": triton_batch(16, 136, STACKED, param=BF16, weight_rounding="compensated", found_inf=0.0),
    "odd rows": triton_batch(131, 8, param=BF16, buffer=BF16, weight_rounding="stochastic"),
}
"""Batches of blocks. In "odd rows", a block has several tiles, which three programs share."""
RULES = (WHITENED, ROOT_FREE, *MIXED)


@pytest.mark.parametrize(
    ("name", "rule"),
    [*(("small", rule) for rule in RULES), *product(("aligned", "odd rows"), (WHITENED, MIXED[1]))],
    ids=str,
)
def test_steps_of_every_rule_match_the_reference(name, rule):
    batch = replace(PARTS[name], rule=rule)
    t = batch.tensors()
    batch.gather(t)
    weights, buffers = batch.reference_step(t)
    grad = t.grad.clone()
    batch.step(t, None, False)
    stored = FP32 if t.residuals else batch.param
    assert_near(map(fp64, batch.blocks(t.weights())), weights, one_step(stored, products=batch.matmul))
    assert_near(map(fp64, batch.blocks(t.buffers)), buffers, one_step(batch.buffer, products=batch.matmul))
    assert_memory_around_blocks_is_untouched(batch, t)
    assert same_bits(t.grad, grad) and not t.skipped[0]


def test_an_update_of_zero_stays_zero():
    batch = triton_batch(6, 5, STACKED, rule=WHITENED, descent={"weight_decay": 0.0})
    t = batch.tensors()
    for x in (*t.grads, *t.buffers):
        x.zero_()
    before = t.copies()
    batch.gather(t)
    batch.step(t, None, False)
    assert torch.equal(t.params[0], before["params 0"])


@pytest.mark.parametrize(
    ("sides", "layout", "aligned"),
    [
        ((13, 16), "whole", True),
        ((13, 16), "wide rows", True),
        ((129, 8), "whole", True),
        ((16, 13), "whole", False),
        ((16, 13), "wide rows", False),
        ((13, 16), "offset by 1", False),
        ((13, 16), "transposed", False),
    ],
)
def test_blocks_of_any_number_of_rows_use_the_aligned_path(sides, layout, aligned, monkeypatch):
    """The number of columns must be a multiple of 8. An example is 865 × 768, the last block of GPT-2's embedding."""
    chosen = {}

    def launch(kernel: Any, grid: int, tensors: Any, numbers: Any, constants: tuple[Any, ...], *options: Any) -> None:
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        chosen[kernel.__name__] = dict(zip(names, constants, strict=True)).get("ALIGNED")
        launches.launch(kernel, grid, tensors, numbers, constants, *options)

    for module in (module_of("kron_gather"), module_of("kron_step")):
        monkeypatch.setattr(module, "launch", launch)
    batch = triton_batch(*sides, STACKED, (layout,), param=BF16, weight_rounding="compensated")
    t = batch.tensors()
    batch.gather(t)
    batch.step(t, None, False)
    assert chosen["kron_gather_kernel"] is chosen["kron_step_kernel"] is aligned
    assert_memory_around_blocks_is_untouched(batch, t)


def test_the_learning_rate_is_a_number_or_a_tensor_on_the_device(monkeypatch):
    batch = triton_batch(13, 9)
    expected = batch.run()
    for dtype in (FP32, torch.float64):
        lr = torch.tensor(batch.lr, dtype=dtype)
        assert_same(replace(batch, lr=lr).run(), expected, "params", "buffers")
        if DEVICE.type == "cpu":  # on a CPU it would be read as a Python float
            monkeypatch.setattr(module_of("kron_step"), "split_lr", lambda lr, device: (0.0, lr.to(device, FP32)))
        assert_same(replace(batch, lr=lr.to(DEVICE)).run(), expected, "params", "buffers")
        monkeypatch.undo()


# ---- skipped blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [200, 512])
def test_the_last_of_many_partial_sums_is_read(number):
    """The last partial sum holds the whole sum, and all others are 0. A NaN in it skips the block."""
    batch = triton_batch(13, 9, STACKED)
    expected, t = batch.tensors(), batch.tensors()
    batch.update(expected)
    batch.step(expected, None, True)

    def in_last(stem: str, *args: Any) -> Any:
        """Call an operator. After a gather, move its partial sum to the last of `number` partial sums."""
        found = call("triton", stem, *args)
        if stem == "kron_gather":
            squares = torch.zeros((3, 2, number), device=DEVICE)
            squares[..., -1:] = found[1]
            return found[0], squares
        return found

    batch.update(t, in_last)
    batch.step(t, None, True)
    assert_same(t, expected, *STATE, "p_c", "p_k", "params", "buffers", "skipped")
    t.squares[0, 1, -1] = torch.nan
    batch.step(t, None, True)
    assert (t.skipped - expected.skipped).tolist() == [0, 1]


@pytest.mark.parametrize("rule", [{}, WHITENED, MIXED[1]], ids=str)
@pytest.mark.parametrize("reason", ["its factors were skipped", "no update saw its gradient"])
def test_a_skipped_block_keeps_its_weights_bitwise(reason, rule):
    batch = triton_batch(13, 66, ((0, 1, 0, 3),), param=BF16, weight_rounding="compensated", rule=rule)
    was, t = batch.tensors(), batch.tensors()
    finite, ok = torch.tensor([True, False, True], device=DEVICE), None
    if reason == "its factors were skipped":
        ok = finite
    else:
        t.grads[0][12, 70] = torch.nan
    batch.gather(t)
    batch.step(t, ok, False)
    assert torch.equal(t.skipped, was.skipped + ~finite)
    for name in ("params", "buffers", "residuals"):
        pairs = zip(batch.blocks(getattr(t, name)), batch.blocks(getattr(was, name)), strict=True)
        assert [same_bits(*pair) for pair in pairs] == [False, True, False], name


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_that_is_not_finite_does_not_spread_without_weight_decay(decoupled):
    batch = triton_batch(13, 8, descent={"weight_decay": 0.0, "decoupled": decoupled})
    t = batch.tensors()
    t.params[0][2, 3] = -torch.inf
    batch.run(t)
    assert t.params[0][2, 3] == -torch.inf and t.params[0].isinf().sum() == 1 and t.buffers[0].isfinite().all()


@pytest.mark.parametrize("dtype", FACTOR_DTYPES, ids=str)
def test_elements_of_u_that_are_not_finite_count_as_0_and_the_step_is_counted(dtype):
    batch = triton_batch(13, 8, dtype=dtype, descent={"momentum": 0.5, "weight_decay": 0.0})
    t = batch.tensors()
    batch.gather(t)
    t.k[0, 0] = 1e38
    t.grad[0, 1, 0] = 1e10
    buffer = t.buffers[0].clone()
    batch.step(t, None, False)
    assert torch.equal(t.buffers[0][1], buffer[1] * 0.5) and t.skipped.item() == 1
