"""`kron_step` in C++: comparison with the FP64 reference and eager PyTorch, and skipped blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.calls.cpu import needs_cpp, threads
from tests.calls.kron import KEPT, MIXED, PLACES, WHITENED, assert_memory_around_blocks_is_untouched
from tests.calls.operators import through
from tests.calls.tensors import BF16, FP32, ROUNDINGS, fp64, same_bits
from tests.calls.tolerances import assert_near, one_step
from tests.cpp.calls import cpp_batch
from tests.cpp.kron_batches import EXACT, with_examples

pytestmark = needs_cpp


@with_examples
def test_step_of_the_weights_matches_the_reference(batch, run):
    t, cached = batch.tensors(), batch.keeps_products
    batch.gather(t, run)
    if cached:
        t.p_c, t.p_k = batch.make_products(t, run)
    before, (weights, buffers) = t.bytes(), batch.reference_step(t)
    batch.step(t, None if cached else torch.ones(len(weights), dtype=torch.bool), cached, run)
    stored = FP32 if t.residuals else batch.param
    assert_near(map(fp64, batch.blocks(t.weights())), weights, one_step(stored, products=batch.matmul))
    assert_near(map(fp64, batch.blocks(t.buffers)), buffers, one_step(batch.buffer, products=batch.matmul))
    assert_memory_around_blocks_is_untouched(batch, t)
    changed = {name.split()[0] for name, now in t.bytes().items() if now != before[name]}
    assert changed <= {"params", "buffers", "residuals"}


@pytest.mark.parametrize("batch", EXACT, ids=str)
def test_weights_are_rounded_bitwise_as_in_eager_pytorch(batch):
    """Without weight decay, fused operations round equally. `scales` is off, because norms are not exact."""
    batch = replace(batch, rule={**batch.rule, "scales": False})
    batch = replace(batch, descent={"momentum": 0.5, "weight_decay": 0.0}, lr=2.0**-5)
    results = []
    for backend in ("cpp", "eager"):
        t = batch.tensors()
        batch.gather(t, through(backend))
        batch.step(t, None, False, through(backend))
        results.append(t.bytes("params", "buffers", "residuals", "skipped"))
    assert results[0] == results[1]


# ---- skipped blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "clip", "rounding"),
    [
        (torch.nan, "frobenius", "compensated"),
        (torch.nan, "row_sum", "nearest"),
        (-torch.inf, "none", "stochastic"),
        (1e30, "row_sum", "compensated"),
        (1e15, "frobenius", "stochastic"),
    ],
)
def test_a_block_that_is_not_finite_is_skipped_and_counted(bad, clip, rounding):
    """The square of 1e30 is infinite. The square of 1e15 is finite, but the norm of m is not. Other blocks step."""
    batch = cpp_batch(13, 9, ((0, 1, 0, 2), (0, 1, 0, 1)), clip=clip, dtype=BF16, matmul=BF16, param=BF16)
    batch = replace(batch, rounding=rounding, weight_rounding=rounding)
    was, clean, t = batch.tensors(), batch.run(), batch.tensors()
    t.grads[0][5, 11] = bad  # in the second block
    batch.run(t)
    finite = torch.tensor([True, False, True])
    assert torch.equal(t.ok, finite) and torch.equal(t.skipped, was.skipped + ~finite)
    for name in KEPT:
        values = [getattr(x, name) for x in (t, clean, was)]
        if isinstance(values[0], list):
            values = [batch.blocks(x) if x else None for x in values]
        for block, (now, stepped, before) in enumerate(zip(*values, strict=True) if values[0] is not None else ()):
            assert same_bits(now, stepped if finite[block] else before), f"{name} of block {block}"
    for product, factor in ((t.p_c, t.c), (t.p_k, t.k)):
        assert_near(product, fp64(factor) @ fp64(factor).swapaxes(1, 2), one_step(products=BF16))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_found_inf_skips_and_counts_every_block(rounding):
    batch = cpp_batch(13, 9, PLACES[2], param=BF16, dtype=BF16, rounding=rounding, weight_rounding=rounding)
    for found_inf in (1.0, torch.nan):
        overflow = replace(batch, found_inf=found_inf)
        was, t = batch.tensors(), overflow.run()
        assert not t.ok.any()
        overflow.step(t, None, False)  # a step without an update
        assert t.bytes(*KEPT) == was.bytes(*KEPT) and torch.equal(t.skipped, was.skipped + 2)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("rule", [{}, WHITENED, MIXED[2]], ids=["paper", "whitened", "mixed"])
@pytest.mark.parametrize("reason", ["its factors were skipped", "no update saw its gradient"])
def test_a_skipped_block_keeps_its_weights_bitwise(reason, rule, num_threads):
    """With two threads, one processes the first three blocks, and the other the last two."""
    batch = cpp_batch(13, 66, ((0, 1, 0, 5),), param=BF16, weight_rounding="compensated", rule=rule)
    was, t = batch.tensors(), batch.tensors()
    finite, ok = torch.tensor([True, False, True, False, True]), None
    if reason == "its factors were skipped":
        ok = finite
    else:
        t.grads[0][12, [70, 202]] = torch.nan
    with threads(num_threads):
        batch.gather(t)
        batch.step(t, ok, False)
    assert torch.equal(t.skipped, was.skipped + ~finite)
    for name in ("params", "buffers", "residuals"):
        pairs = zip(batch.blocks(getattr(t, name)), batch.blocks(getattr(was, name)), strict=True)
        assert [same_bits(*pair) for pair in pairs] == (~finite).tolist(), name


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_that_is_not_finite_does_not_spread_without_weight_decay(decoupled):
    batch = cpp_batch(13, 8, descent={"weight_decay": 0.0, "decoupled": decoupled})
    t = batch.tensors()
    t.params[0][2, 3] = -torch.inf
    batch.run(t)
    assert t.params[0][2, 3] == -torch.inf and t.params[0].isinf().sum() == 1 and t.buffers[0].isfinite().all()


def test_elements_of_u_that_are_not_finite_count_as_0_and_the_step_is_counted():
    batch = cpp_batch(13, 8, descent={"momentum": 0.5, "weight_decay": 0.0})
    t = batch.tensors()
    batch.gather(t)
    t.k[0, 0] = 1e38
    t.grad[0, 1, 0] = 1e10
    buffer = t.buffers[0].clone()
    batch.step(t, None, False)
    assert torch.equal(t.buffers[0][1], buffer[1] * 0.5) and t.skipped.item() == 1


# ---- the recipe ------------------------------------------------------------------------------------------------------


def test_zero_update_stays_zero_and_norms_ignore_elements_that_are_not_finite():
    batch = cpp_batch(13, 8, ((0, 2, 0, 1),), rule=WHITENED, lr=1.0, descent={"momentum": 0.0, "weight_decay": 0.0})
    t, was = batch.tensors(), batch.tensors()
    t.grads[0][:13] = 0
    batch.gather(t)
    t.k[1, 0] = t.k[1, :, 0] = 0
    t.k[1, 0, 0] = 1e38
    t.grad[1, 1, 0] = 1e10
    batch.step(t, None, False)
    assert same_bits(t.params[0][:13], was.params[0][:13]) and not t.buffers[0][:13].any()
    moved = was.params[0][13:] - t.params[0][13:]
    assert torch.isfinite(moved).all() and moved.norm() > 0
    assert_near([fp64(moved.norm())], [fp64(t.update_norms[1])], one_step(FP32))


@pytest.mark.parametrize("buffer", [FP32, BF16], ids=str)
def test_the_average_is_preconditioned_before_it_is_rounded(buffer):
    """With C = I and K = I, the step is M′."""
    rule, descent = {**WHITENED, "scales": False}, {"momentum": 0.9, "weight_decay": 0.0}
    batch = cpp_batch(13, 8, buffer=buffer, rule=rule, descent=descent, lr=1.0)
    t, was = batch.tensors(), batch.tensors()
    t.c.copy_(torch.eye(13))
    t.k.copy_(torch.eye(8))
    batch.gather(t)
    batch.step(t, None, True)
    average = 0.9 * was.buffers[0].double() + 0.1 * was.grads[0].double()
    assert_near([fp64(t.buffers[0])], [fp64(average)], one_step(buffer))
    assert_near(
        [fp64(t.params[0])], [fp64(was.params[0].double() - 0.1 * was.grads[0] - 0.9 * average)], one_step(FP32)
    )
