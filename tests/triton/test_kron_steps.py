"""Updates and steps in Triton: reproducibility, rounding, blocks that are not finite, and changed tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.calls.device import DEVICE, kernel_test, launches
from tests.calls.kron import KEPT, ROOT_FREE, STATE, WHITENED, assert_same
from tests.calls.operators import dispatched, through
from tests.calls.tensors import BF16, ROUNDINGS, fp64, same_bits
from tests.calls.tolerances import assert_near, one_step
from tests.triton.calls import triton_batch
from tests.triton.kron_batches import ALIGNED, LARGE, STACKED

pytestmark = kernel_test


# ---- reproducibility and rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [replace(LARGE, rows=17), ALIGNED, triton_batch(17, 13, rule=WHITENED)],
    ids=["ragged", "aligned", "whitened"],
)
def test_the_same_call_gives_the_same_bits(batch):
    first, second = batch.run(), batch.run(run=dispatched("triton"))
    assert_same(first, second, *STATE, "curvature", "p_c", "p_k", "params", "buffers", "residuals", "skipped", "ok")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    "batch",
    [
        triton_batch(17, 130, layouts=("every other",), clip="none"),
        triton_batch(8, 136, clip="none"),
        triton_batch(17, 136, clip="none"),
        triton_batch(16, 64, STACKED, clip="frobenius", options={"riemannian_momentum": 0.0}),
    ],
    ids=["ragged", "aligned", "odd rows", "clipped"],
)
def test_bf16_is_rounded_bitwise_as_in_eager_pytorch(batch, rounding):
    """G and m are 0, so m' is −γ/4 · I or −γ/2 · I. Then C' = C(1 + 2⁻ⁿ) is rounded only once."""
    modes = {"rounding": rounding, "weight_rounding": rounding, "param": BF16, "buffer": BF16, "exact": "rounding"}
    batch = replace(batch, **modes, lr=2.0**-5)
    before, actual, expected = batch.tensors(), batch.run(), batch.run(run=through("eager"))
    assert_same(actual, expected, *STATE, "params", "buffers", "residuals", "skipped")
    moved = (actual.factor("c") != before.factor("c")).mean()
    assert 0.1 < moved < 0.9 if rounding == "stochastic" else moved > 0
    assert not same_bits(actual.params[0], before.params[0])


def test_random_bits_depend_on_the_step():
    batch = triton_batch(17, 13, param=BF16, rounding="stochastic", weight_rounding="stochastic")
    first, later = batch.tensors(), batch.tensors()
    later.steps += 1
    for t in (first, later):
        batch.run(t)
    assert not same_bits(first.c, later.c) and not same_bits(first.params[0], later.params[0])
    assert_same(first, later, "m_c", "m_k")


# ---- blocks that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "clip", "rounding", "rule"),
    [
        (torch.nan, "frobenius", "compensated", {}),
        (torch.nan, "row_sum", "nearest", {}),
        (-torch.inf, "none", "stochastic", {}),
        (1e30, "row_sum", "compensated", {}),
        (1e15, "frobenius", "stochastic", {}),
        (torch.nan, "row_sum", "compensated", WHITENED),
        (1e30, "none", "stochastic", ROOT_FREE),
    ],
)
def test_a_block_that_is_not_finite_is_skipped_and_counted(bad, clip, rounding, rule):
    """The square of 1e30 is infinite. The square of 1e15 is finite, but the norm of m is not. Other blocks step."""
    batch = triton_batch(13, 9, ((0, 1, 0, 2), (0, 1, 0, 1)), clip=clip, param=BF16)
    batch = replace(batch, rounding=rounding, weight_rounding=rounding, rule=rule)
    was, clean, t = batch.tensors(), batch.run(), batch.tensors()
    t.grads[0][5, 11] = bad  # in the second block
    batch.run(t)
    finite = torch.tensor([True, False, True], device=DEVICE)
    assert torch.equal(t.ok, finite)
    assert torch.equal(t.skipped, was.skipped + ~finite)
    for name in KEPT:
        values = [getattr(x, name) for x in (t, clean, was)]
        if isinstance(values[0], list):
            values = [batch.blocks(x) if x else None for x in values]
        if values[0] is not None:
            for block, (now, stepped, before) in enumerate(zip(*values, strict=True)):
                assert same_bits(now, stepped if finite[block] else before), f"{name} of block {block}"
    for actual, factor in () if batch.is_whitened else ((t.p_c, t.c), (t.p_k, t.k)):
        assert_near(actual, fp64(factor) @ fp64(factor).swapaxes(1, 2), one_step(products=BF16))


@pytest.mark.parametrize("side", ["m_c", "m_k"])
def test_a_momentum_that_is_not_finite_keeps_both_factors(side):
    batch = triton_batch(13, 9, STACKED)
    was, t = batch.tensors(), batch.tensors()
    for each in (was, t):
        getattr(each, side)[0, 0, 0] = torch.inf
    batch.run(t)
    assert t.ok.tolist() == [False, True] and t.skipped.tolist() == [1, 1]
    for name in ("c", "k", "m_c", "m_k", "params", "buffers"):
        values = [getattr(x, name) for x in (t, was)]
        blocks = zip(*(batch.blocks(x) if isinstance(x, list) else x for x in values), strict=True)
        assert [same_bits(*pair) for pair in blocks] == [True, False], name


@pytest.mark.parametrize(
    ("rounding", "rule"), [("stochastic", {}), ("compensated", {}), ("nearest", WHITENED)], ids=str
)
def test_found_inf_skips_and_counts_every_block(rounding, rule):
    batch = triton_batch(13, 9, STACKED, param=BF16, rounding=rounding, weight_rounding=rounding, rule=rule)
    was, t = batch.tensors(), replace(batch, found_inf=1.0).run()
    assert_same(t, was, *KEPT)
    assert torch.equal(t.skipped, was.skipped + 1) and not t.ok.any()


# ---- compilations and versions of tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{}, WHITENED], ids=str)
def test_changed_values_do_not_recompile(rule):
    batch = triton_batch(16, 8, param=BF16, rounding="stochastic", weight_rounding="stochastic", rule=rule)
    batch.run()
    before = launches.num_compilations()
    later = batch.tensors()
    later.steps += 100
    batch.run(later)
    options = {"batch_size": 1, "beta2": 0, "riemannian_momentum": 0, "damping": 1e-4, "gamma": 0}
    replace(batch, options=options, descent={"momentum": 0, "weight_decay": 0, "decoupled": True}).run()
    replace(batch, lr=1.0, grad_scale=2.0, found_inf=1.0, maximize=True, clip="none", seed=9).run()
    replace(batch, rows=64, cols=24, places=STACKED).run()
    assert launches.num_compilations() == before


@pytest.mark.parametrize("rule", [{}, WHITENED], ids=str)
def test_changed_tensors_get_a_new_version(rule):
    rest = {"rounding": "compensated", "weight_rounding": "compensated", "rule": rule}
    batch = triton_batch(16, 8, STACKED, param=BF16, **rest)
    t = batch.tensors()
    named = t.named()
    before = {name: x._version for name, x in named.items()}
    batch.run(t)
    changed = {name.split()[0] for name, x in named.items() if x._version > before[name]}
    assert changed == {*KEPT, "skipped"} - {"curvature"} | {*(("curvature",) if rule else ("p_c", "p_k"))}
    same = {name for name, x in named.items() if x._version == before[name]}
    assert {name.split()[0] for name in same} - {"update_norms"} == {"grads", "seeds", "steps"}
