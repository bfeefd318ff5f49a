"""The diagonal step in C++: comparison with the FP64 reference, and bitwise with FP32 arithmetic in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rootfree_kernels.rounding import join_compensated, split_compensated
from tests.calls.cpu import needs_cpp
from tests.calls.operators import through
from tests.calls.rf_rmsprop import assert_equal, assert_matches_reference, bits, counts, flat, fp32_step
from tests.calls.tensors import BF16, FP16, FP32, FP64, ROUNDINGS, assert_memory_around_is_untouched, clones, same_bits
from tests.cpp.calls import CHUNK, LAYOUTS, PIECE, SHAPES, cpp_call
from tests.cpp.rounding_cases import every_pattern, rounding_step, to_be_rounded

pytestmark = needs_cpp


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
    lambda param, grad, **rest: cpp_call(param=param, grad=grad or param, **rest),
    shapes=st.lists(st.one_of(st.sampled_from(SHAPES), st.integers(0, 1100).map(lambda n: (n,))), min_size=1),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=5).map(tuple),
    param=st.sampled_from([FP32, BF16, FP16]),
    grad=st.sampled_from([None, FP32, FP64]),  # None: the dtype of the parameters
    square=STATE_DTYPES,
    buffer=STATE_DTYPES,
    rounding=st.sampled_from(ROUNDINGS),
    weight_rounding=st.sampled_from(ROUNDINGS),
    options=ANY_OPTIONS,
    lr=st.sampled_from([0, 0.05]),
    grad_scale=st.sampled_from([None, 3.0]),
    found_inf=st.sampled_from([None, 0.0]),
    steps=st.sampled_from([3, 70000]),
    seed=st.integers(0, 99),
)


# ---- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@given(CALLS)
@example(cpp_call(SHAPES, LAYOUTS))
@example(cpp_call(SHAPES, LAYOUTS, BF16, BF16, BF16, BF16, "stochastic", "stochastic"))
@example(cpp_call(SHAPES, LAYOUTS, BF16, FP32, BF16, FP32, "compensated", "compensated"))
@example(cpp_call(SHAPES, LAYOUTS[::-1], FP16, FP64, BF16, FP32, "compensated", "nearest"))
@settings(max_examples=150, deadline=None)
def test_step_matches_the_reference_and_fp32_arithmetic_bitwise(call):
    """Gradients, counts of skipped elements and memory around tensors do not change."""
    lists, memory = call.tensors()
    before = flat(lists)
    call.run(lists)
    shaped = {name: [x.view(y.shape) for x, y in zip(before[name], lists[name], strict=True)] for name in lists}
    assert_matches_reference(call, lists, shaped)
    after = flat(lists)
    assert_equal({name: after[name] for name in ("grad", "skipped")}, {n: before[n] for n in ("grad", "skipped")})
    assert_memory_around_is_untouched(memory)
    assert_equal(after, fp32_step(call, before))


@pytest.mark.parametrize("steps", [3, 70000, "each its own"], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bf16_is_rounded_bitwise_as_in_eager_pytorch(rounding, steps):
    shapes = [shape for shape in SHAPES if 0 not in shape]  # eager PyTorch has no norm of empty tensors
    if steps == "each its own":
        steps = torch.arange(len(shapes))
    kinds = (BF16, BF16, BF16, BF16, rounding, rounding)
    call = cpp_call(shapes, LAYOUTS, *kinds, steps=steps, exact=True)
    assert_equal(call.run(), call.run(run=through("eager")))
    if rounding == "stochastic":
        other = replace(call, steps=9).run()
        assert not torch.equal(call.run()["param"][-1], other["param"][-1])


def test_compensated_pairs_equal_an_fp32_run_bitwise():
    wide_call = cpp_call(SHAPES)
    pairs_call = replace(wide_call, param=BF16, square=BF16, rounding="compensated", weight_rounding="compensated")
    wide, pairs = wide_call.tensors()[0], pairs_call.tensors()[0]
    for name, residual in (("param", "weight_residual"), ("square", "square_residual")):
        splits = [split_compensated(x) for x in wide[name]]
        pairs[name], pairs[residual] = map(list, zip(*splits, strict=True))
    pairs["grad"], pairs["buffer"] = clones(wide["grad"]), clones(wide["buffer"])
    for _ in range(3):
        wide_call.run(wide)
        pairs_call.run(pairs)
    for name, residual in (("param", "weight_residual"), ("square", "square_residual")):
        joined = [join_compensated(*pair) for pair in zip(pairs[name], pairs[residual], strict=True)]
        assert all(map(same_bits, joined, wide[name])), name
    assert_equal(pairs, {"buffer": wide["buffer"]})


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_fp32_is_rounded_to_16_bits_as_in_pytorch(dtype):
    values = to_be_rounded(dtype)
    call, lists = rounding_step(dtype, 1.0, values)
    call.run(lists)
    assert torch.equal(lists["param"][0], (-values).to(dtype)) and counts(lists) == [0]


@pytest.mark.parametrize(("dtype", "rounding"), [(FP16, "nearest"), *product([BF16], ROUNDINGS)], ids=str)
def test_every_16_bit_value_is_read_and_written_unchanged(dtype, rounding):
    """NaNs stay NaNs, but their payload may change."""
    call, lists = rounding_step(dtype, 0.0, torch.ones(2**16))
    call = replace(call, weight_rounding=rounding)
    lists["param"][0].copy_(every_pattern(dtype))
    if rounding == "compensated":
        lists["weight_residual"] = [torch.zeros(2**16, dtype=torch.int16)]
    call.run(lists)
    actual, expected = lists["param"][0], every_pattern(dtype)
    number = ~expected.isnan()
    assert same_bits(actual[number], expected[number]) and actual[~number].isnan().all()


# ---- skipped elements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("place", [0, PIECE + 5, CHUNK + 3, 2 * CHUNK + 6], ids=str)
def test_an_element_that_is_not_finite_is_skipped_and_counted_once(bad, place):
    """1e30 is finite, but its square is not."""
    call = cpp_call([40, 2 * CHUNK + 7, 9], param=BF16, weight_rounding="compensated")
    lists, before, expected = call.tensors()[0], call.tensors()[0], call.run()
    lists["grad"][1][place] = bad
    call.run(lists)
    changed = ("param", "square", "buffer", "weight_residual")
    for name in changed:
        expected[name][1][place] = before[name][1][place]
    assert_equal(lists, {name: expected[name] for name in changed})
    assert counts(lists) == [0, 2, 2]  # they started at 0, 1, 2
    lists["grad"][1].fill_(bad)
    assert counts(call.run(lists)) == [0, 3, 2]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_found_inf_skips_and_counts_everything(rounding):
    for found_inf in (1.0, torch.nan):
        kinds = (BF16, BF16, BF16, BF16, rounding, rounding)
        call = cpp_call([2210, 1, CHUNK], LAYOUTS[:1], *kinds, found_inf=found_inf)
        before = call.tensors()[0]
        expected = bits({**before, "skipped": [x + 1 for x in before["skipped"]]})
        assert bits(call.run()) == expected


def test_zero_damping_and_zero_curvature_skips_an_element():
    """Its update would be 0/0. Eager PyTorch skips it too."""
    call = cpp_call([PIECE + 3], options={"damping": 0.0})
    lists = call.tensors()[0]
    for name in ("grad", "square"):
        lists[name][0][7] = 0.0
    weight = lists["param"][0][7].item()
    call.run(lists)
    assert lists["param"][0][7] == weight and counts(lists) == [1]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_residual_is_dropped_if_a_weight_was_set_to_0(zero):
    """±0 with a negative residual would join to NaN."""
    call = cpp_call([5], param=BF16, weight_rounding="compensated", options={"weight_decay": 0.0}, lr=0.0)
    lists = call.tensors()[0]
    lists["param"][0].fill_(zero)
    lists["weight_residual"][0].fill_(-5)
    call.run(lists)
    assert not lists["param"][0].any() and not lists["weight_residual"][0].any()


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_that_is_not_finite_does_not_spread_without_weight_decay(decoupled):
    call = cpp_call([5], options={"weight_decay": 0.0, "decoupled": decoupled})
    lists = call.tensors()[0]
    lists["param"][0][2] = -torch.inf
    call.run(lists)
    assert lists["param"][0][2] == -torch.inf and lists["buffer"][0].isfinite().all()
