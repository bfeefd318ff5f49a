"""`kron_factor` in C++: comparison with the FP64 reference and eager PyTorch, bitwise if arithmetic is exact."""

from __future__ import annotations

import pytest
import torch

from tests.calls import reference as ref
from tests.calls.cpu import needs_cpp
from tests.calls.kron import PLACES, ROOT_FREE, STATE, WHITENED, Tensors
from tests.calls.operators import through
from tests.calls.tensors import BF16, CLIPS, FP32, ROUNDINGS, same_bits
from tests.calls.tolerances import assert_near, one_step, relative_error
from tests.cpp.calls import cpp_batch
from tests.cpp.kron_batches import assert_update_matches_reference, with_examples

pytestmark = needs_cpp


@with_examples
def test_factor_update_matches_the_reference(batch, run):
    assert_update_matches_reference(batch, run)


@pytest.mark.parametrize(
    ("clip", "norm"), [("frobenius", "above 1"), ("row_sum", "above 1"), ("none", ""), ("frobenius", "")]
)
@pytest.mark.parametrize("matmul", [FP32, BF16], ids=str)
def test_factor_changes_match_the_reference_and_eager_pytorch(clip, norm, matmul):
    """Compare C′ − C. Compensated pairs hold FP32 values, so small changes are visible."""
    small = {"gamma": 0.0, "batch_size": 0.01, "damping": 0.0, "riemannian_momentum": 0.1}
    numbers = small if norm == "" and clip == "frobenius" else {"riemannian_momentum": 0.1}
    batch = cpp_batch(136, 70, dtype=BF16, matmul=matmul, rounding="compensated", clip=clip, options=numbers)
    t, other = batch.tensors(), batch.run(run=through("eager"))
    (state,), (expected,) = batch.reference_states(t), batch.reference_update(t)
    batch.run(t)
    for side, name in (("c", "C"), ("k", "K")):
        old, m = getattr(state, name), getattr(expected, f"m_{name}")
        assert clip == "none" or (ref.clipped_beta2(m, 1.0, clip) < 1) == (norm == "above 1")
        assert_near(t.factor(side) - old, [getattr(expected, name) - old], one_step(products=BF16))
        if matmul == FP32:  # m is rounded once, so few elements differ from eager PyTorch
            assert (getattr(t, f"m_{side}") != getattr(other, f"m_{side}")).float().mean() < 0.01
            assert relative_error(torch.tensor(t.factor(side) - old), other.factor(side) - old) < 1e-3


def with_symmetric_residuals(t: Tensors) -> Tensors:
    """Make the residuals of the factors symmetric; return `t`."""
    for residual in (t.lo_c, t.lo_k):
        if residual is not None:
            residual.copy_(residual.tril() + residual.tril(-1).mT)
    return t


@pytest.mark.parametrize("sides", [(37, 18), (136, 5)], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("direction", ["root_free", "whitened"])
def test_factors_are_rounded_bitwise_as_in_eager_pytorch(direction, rounding, sides):
    """G and m are 0, so m′ = −γ/2 · I. Then C′ = C(1 + 2⁻⁹) is rounded only once."""
    numbers = {"beta2": 2.0**-8, "riemannian_momentum": 0.0, "damping": 0.0}
    batch = cpp_batch(*sides, PLACES[2], dtype=BF16, matmul=BF16, rounding=rounding, clip="none", options=numbers)
    batch.rule = {"direction": direction}
    results = []
    for backend in ("cpp", "eager"):
        t = batch.tensors()
        if direction == "whitened":
            with_symmetric_residuals(t)
        for grad in t.grads:
            grad.zero_()
        before = t.factor("c")
        batch.update(t, through(backend))
        results.append(t.bytes(*STATE))
    assert results[0] == results[1]
    moved = (t.factor("c") != before).mean()
    assert moved == 0 if rounding == "nearest" else moved > 0


@pytest.mark.parametrize("side", ["m_c", "m_k"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("clip", CLIPS)
def test_a_momentum_that_is_not_finite_keeps_both_factors(side, bad, clip):
    batch = cpp_batch(37, 34, ((0, 2, 0, 1),), clip=clip)
    was, t = batch.tensors(), batch.tensors()
    for each in (was, t):
        getattr(each, side)[0, 33, 1] = getattr(each, side)[0, 1, 33] = bad  # outside the diagonal tiles
    batch.run(t)
    assert t.ok.tolist() == [False, True] and t.skipped.tolist() == [1, 1]
    for name in ("c", "k", "m_c", "m_k", "params", "buffers"):
        blocks = [batch.blocks(x) if isinstance(x, list) else x for x in (getattr(t, name), getattr(was, name))]
        assert [same_bits(*pair) for pair in zip(*blocks, strict=True)] == [True, False], name


# ---- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(31, 33), (64, 5), (200, 129)], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_whitened_factors_stay_bitwise_symmetric(dtype, rounding, sides):
    batch = cpp_batch(*sides, PLACES[2], dtype=dtype, matmul=dtype, rounding=rounding, rule=WHITENED)
    t = batch.tensors()
    for _ in range(3):
        assert batch.update(t).all()
        for x in (t.c, t.k, t.lo_c, t.lo_k):
            assert x is None or same_bits(x, x.mT)


@pytest.mark.parametrize("rule", [WHITENED, ROOT_FREE], ids=["whitened", "root_free"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zero_gradient_keeps_factors_and_overflow_is_not_ok(rounding, rule):
    batch = cpp_batch(37, 18, ((0, 5, 0, 1),), dtype=BF16, matmul=BF16, rounding=rounding, rule=rule)
    t, was = batch.tensors(), batch.tensors()
    gradients = batch.blocks(t.grads)
    for block in (1, 3):  # block 3 has had no nonzero gradient yet
        gradients[block].zero_()
    gradients[2][0, 0] = 1e30
    assert batch.update(t).tolist() == [True, True, False, True, True]
    for name in (*STATE, "curvature"):
        if getattr(t, name) is not None:
            same = [same_bits(x, y) for x, y in zip(getattr(t, name), getattr(was, name), strict=True)]
            assert same == [False, True, True, True, False], name


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("found_inf", [None, 1.0])
def test_a_block_starts_at_its_first_gradient_as_in_eager_pytorch(found_inf, dtype, rounding):
    """With β₂ = 0, factors keep their initial value (q(1 + λ))^(−1/4)·I."""
    batch = cpp_batch(37, 18, ((0, 4, 0, 1),), dtype=dtype, rounding=rounding, options={"beta2": 0.0}, rule=ROOT_FREE)
    batch.found_inf = found_inf
    t, other, was = batch.tensors(), batch.tensors(), batch.tensors()
    batch.update(t)
    batch.update(other, through("eager"))
    starts = [found_inf is None, False, False, found_inf is None]
    for side in ("c", "k"):
        pairs = zip(getattr(t, side), getattr(was, side), strict=True)
        assert [not same_bits(*pair) for pair in pairs] == starts
        actual, expected = torch.tensor(t.factor(side)), torch.tensor(other.factor(side))
        torch.testing.assert_close(actual, expected, rtol=one_step(dtype), atol=0)
        if found_inf is None:
            q, (value, *_) = t.curvature[0].double(), actual[0].diagonal()
            torch.testing.assert_close(value, (q * 1.1) ** -0.25, rtol=one_step(dtype), atol=0)
            assert torch.equal(actual[0], torch.eye(len(actual[0]), dtype=actual.dtype) * value)


def test_factors_with_gaps_are_an_error():
    """Kernels assume contiguous factors."""
    batch = torch.eye(5).expand(2, 5, 5).contiguous()
    with pytest.raises(ValueError, match="not contiguous: pass a contiguous tensor"):
        torch.ops.rootfree_native.kron_factor(
            *(batch[:, :4, :4], batch, batch, batch, None, None, None, None, None, torch.ones(2, 4, 5)),
            *(torch.ones(3, 2, 1), torch.zeros(2, dtype=torch.int32), torch.zeros(2), None),
            *(1.0, 0.1, 0.5, 0.1, 1.0, "frobenius", "nearest", "root_free", False, "identity"),
        )
