"""The diagonal step in Triton: comparison with the FP64 reference, and with eager PyTorch, bitwise if it is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rootfree_kernels.pointer_tables import rf_rmsprop as diagonal
from tests.calls.device import kernel_test
from tests.calls.operators import through
from tests.calls.rf_rmsprop import assert_equal, assert_matches_reference, copied, counts
from tests.calls.tensors import BF16, FP16, FP32, ROUNDINGS, assert_memory_around_is_untouched
from tests.triton.calls import CHUNK, LAYOUTS, SHAPES, triton_call

pytestmark = kernel_test


# ---- the formula -----------------------------------------------------------------------------------------------------


DTYPES = st.sampled_from([FP32, BF16, FP16])
STATE_DTYPES = st.sampled_from([FP32, BF16])
ANY_OPTIONS = st.fixed_dictionaries(
    {
        "batch_size": st.sampled_from([1, 7.5]),
        "beta2": st.sampled_from([0, 0.1, 0.9]),
        "gamma": st.sampled_from([0, 1]),
        "momentum": st.sampled_from([0, 0.9]),
        "damping": st.sampled_from([0, 1e-4, 1]),
        "weight_decay": st.sampled_from([0, 0.1]),
        "decoupled": st.booleans(),
        "maximize": st.booleans(),
    }
)
CALLS = st.builds(
    triton_call,
    *(
        st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
        st.lists(st.sampled_from(LAYOUTS), min_size=1).map(tuple),
    ),
    *(DTYPES, DTYPES, STATE_DTYPES, STATE_DTYPES, st.sampled_from(ROUNDINGS), st.sampled_from(ROUNDINGS), ANY_OPTIONS),
    lr=st.sampled_from([0, 0.05]),
    grad_scale=st.sampled_from([None, 3.0]),
    found_inf=st.sampled_from([None, 0.0]),
    seed=st.integers(0, 99),
)


@given(CALLS)
@example(triton_call(SHAPES, LAYOUTS))
@example(triton_call(SHAPES, LAYOUTS, BF16, BF16, BF16, BF16, "stochastic", "stochastic"))
@example(triton_call(SHAPES, LAYOUTS, BF16, FP32, BF16, FP32, "compensated", "compensated"))
@settings(max_examples=50, deadline=None)
def test_step_matches_the_reference_and_writes_nothing_else(call):
    lists, memory = call.tensors()
    before = copied(lists)
    call.run(lists)
    assert_matches_reference(call, lists, before)
    assert_equal({name: lists[name] for name in ("grad", "skipped")}, {n: before[n] for n in ("grad", "skipped")})
    assert_memory_around_is_untouched(memory)


@pytest.mark.parametrize("steps", [3, 70000, "each its own"], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bf16_is_rounded_bitwise_as_in_eager_pytorch(rounding, steps):
    if steps == "each its own":
        steps = torch.arange(len(SHAPES))
    shapes = [shape if 0 not in shape else (2,) for shape in SHAPES]  # eager PyTorch has no norm of empty tensors
    call = triton_call(
        shapes, ("whole", "offset by 1"), BF16, BF16, BF16, BF16, rounding, rounding, steps=steps, exact=True
    )
    actual, expected = call.run(), call.run(run=through("eager"))
    assert_equal(actual, expected)
    if rounding == "stochastic":
        call = replace(call, steps=9)
        assert not torch.equal(call.run()["param"][5], actual["param"][5])


def test_fp16_and_fp32_steps_with_exact_arithmetic_are_exact():
    for dtype in (FP32, FP16):
        call = triton_call(
            SHAPES[3:], ("whole", "offset by 1"), dtype, FP32, FP32, FP32, "stochastic", "stochastic", exact=True
        )
        assert_equal(call.run(), call.run(run=through("eager")))


@pytest.mark.parametrize("layout", ("transposed", "every other"))
@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
def test_strides_do_not_change_the_result(layout, rounding):
    """Random bits depend on the row-major index, not on the position in memory."""
    call = triton_call([(17, 130), (2, 3, 4)], ("whole",), BF16, BF16, BF16, BF16, rounding, rounding)
    assert_equal(replace(call, layouts=(layout,)).run(), call.run())


def test_tensors_with_equal_strides_are_not_copied(monkeypatch):
    written = []
    monkeypatch.setattr(diagonal, "write_back", lambda old, new: written.extend(zip(old, new, strict=True)))
    call = triton_call([(17, 130), (2, 3, 4)], ("transposed",))
    assert_equal(call.run(), replace(call, layouts=("whole",)).run())
    assert written and all(x is y for old, new in written for x, y in zip(old, new, strict=True))


# ---- skipped elements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("place", ("first", "middle", "last"))
def test_an_element_that_is_not_finite_is_skipped_and_counted_once(bad, place):
    """1e30 is finite, but its square is not."""
    index = {"first": 0, "middle": CHUNK + 5, "last": 3 * CHUNK + 6}[place]
    call = triton_call([(40,), (3 * CHUNK + 7,), (9,)], param=BF16, weight_rounding="compensated")
    changed = ("param", "square", "buffer", "weight_residual")
    lists, before, expected = call.tensors()[0], call.tensors()[0], call.run()
    lists["grad"][1][index] = bad
    call.run(lists)
    for name in changed:
        expected[name][1][index] = before[name][1][index]
    assert_equal(lists, {name: expected[name] for name in changed})
    assert counts(lists) == [0, 2, 2]  # they started at 0, 1, 2
    call.run(lists)
    assert counts(lists) == [0, 3, 2]


def test_found_inf_skips_and_counts_every_block():
    call = triton_call([(17, 130), (), (CHUNK,)], ("whole", "offset by 1"), found_inf=1.0)
    lists, before = call.run(), call.tensors()[0]
    assert_equal(lists, {**before, "skipped": [x + 1 for x in before["skipped"]]})
    assert_equal(replace(call, found_inf=0.0).run(), replace(call, found_inf=None).run())


def test_zero_damping_and_zero_curvature_skips_an_element():
    """Its update would be 0/0. Eager PyTorch skips it too."""
    call = triton_call([(CHUNK + 3,)], options={"damping": 0.0})
    lists = call.tensors()[0]
    for name in ("grad", "square"):
        lists[name][0][7] = 0.0
    weight = lists["param"][0][7].item()
    call.run(lists)
    assert lists["param"][0][7] == weight and counts(lists) == [1]


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_that_is_not_finite_does_not_spread_without_weight_decay(decoupled):
    call = triton_call([(5,)], options={"weight_decay": 0.0, "decoupled": decoupled})
    lists = call.tensors()[0]
    lists["param"][0][2] = -torch.inf
    call.run(lists)
    assert lists["param"][0][2] == -torch.inf and lists["buffer"][0].isfinite().all()
