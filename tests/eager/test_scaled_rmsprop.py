"""`scaled_rmsprop` in eager PyTorch, compared with the FP64 reference."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calls.kron import MIXED, ROOT_FREE, WHITENED
from tests.calls.operators import dispatched
from tests.calls.rf_rmsprop import assert_equal, copied, counts
from tests.calls.scaled_rmsprop import ScaledCall, assert_matches_reference
from tests.calls.tensors import BF16, FP16, FP32, FP64, ROUNDINGS, assert_memory_around_is_untouched

SHAPES = [(), (1031,), (17, 130), (6, 5, 3, 7)]
RULES = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(["root_free", "whitened"]),
        "relative_damping": st.booleans(),
        "momentum_on": st.sampled_from(["update", "gradient"]),
        "scales": st.booleans(),
    }
).flatmap(lambda rule: st.just({**rule, "nesterov": rule["momentum_on"] == "gradient" and rule["scales"]}))


@pytest.mark.parametrize("rule", [WHITENED, ROOT_FREE, *MIXED], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
def test_step_matches_the_reference(dtype, rounding, rule):
    state = {FP64: FP64, BF16: BF16}.get(dtype, FP32)
    kinds = (dtype, dtype, state, state, rounding, rounding)
    call = ScaledCall(SHAPES, ("transposed", "every other"), *kinds, grad_scale=3.0, rule=rule)
    lists, memory = call.tensors()
    before = copied(lists)
    call.run(lists, dispatched("eager"))
    assert_matches_reference(call, lists, before)
    assert_equal({name: lists[name] for name in ("grad", "skipped")}, {n: before[n] for n in ("grad", "skipped")})
    assert_memory_around_is_untouched(memory)


@given(
    rule=RULES,
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    options=st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([1.0, 7.5]),
            "beta2": st.sampled_from([0.05, 0.9]),
            "gamma": st.sampled_from([0.0, 1.0]),
            "momentum": st.sampled_from([0.0, 0.9]),
            "damping": st.sampled_from([0.0, 1e-6, 0.2]),
            "weight_decay": st.sampled_from([0.0, 0.3]),
            "decoupled": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
)
@settings(max_examples=1000, deadline=None)
def test_fp64_steps_match_the_reference_to_twelve_digits(rule, seed, sizes, options):
    call = ScaledCall(sizes, ("whole",), FP64, FP64, FP64, FP64, seed=seed, rule=rule, options=options)
    lists, _ = call.tensors()
    before = copied(lists)
    call.run(lists)
    assert_matches_reference(call, lists, before, allowed=1e-12)


def test_chunks_do_not_change_a_step(monkeypatch):
    call = ScaledCall([3, 50, 7, 20], param=FP64, grad=FP64, square=FP64, buffer=FP64, rule=WHITENED)
    whole, _ = call.tensors()
    pieces = copied(whole)
    call.run(whole)
    module = sys.modules["rootfree_kernels.eager.rf_rmsprop"]  # the package's attribute of this name is a function
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 55)
    call.run(pieces)
    assert_equal(pieces, whole)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200])
def test_only_tensors_with_finite_gradients_step(bad):
    call = ScaledCall([3, 4, 5], param=FP64, grad=FP64, square=FP64, buffer=FP64, rule=WHITENED)
    lists, _ = call.tensors()
    lists["grad"][1][2] = bad
    before = copied(lists)
    call.run(lists)
    assert [now - was for now, was in zip(counts(lists), counts(before), strict=True)] == [0, 1, 0]
    for name in ("param", "square", "buffer", "curvature"):
        same = [torch.equal(x, y) for x, y in zip(lists[name], before[name], strict=True)]
        assert same == [False, True, False], name


def test_zero_gradient_keeps_the_curvature_and_continues_the_momentum():
    call = ScaledCall([4, 4], param=FP64, grad=FP64, square=FP64, buffer=FP64, rule=WHITENED)
    lists, _ = call.tensors()
    for grad in lists["grad"]:
        grad.zero_()
    before = copied(lists)
    call.run(lists)
    assert_matches_reference(call, lists, before, allowed=1e-12)
    for name in ("square", "curvature"):
        assert all(torch.equal(x, y) for x, y in zip(lists[name], before[name], strict=True))
    assert counts(lists) == counts(before)
