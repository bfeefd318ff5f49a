"""The scaled diagonal step in C++: comparison with the FP64 reference, bitwise if arithmetic is exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.calls.cpu import needs_cpp, threads
from tests.calls.kron import MIXED, ROOT_FREE, WHITENED
from tests.calls.operators import dispatched, through
from tests.calls.rf_rmsprop import Lists, assert_equal, bits, copied, counts, flat
from tests.calls.scaled_rmsprop import ScaledCall, assert_matches_reference
from tests.calls.tensors import BF16, FP16, FP32, FP64, ROUNDINGS, assert_memory_around_is_untouched, same_bits
from tests.cpp.calls import CHUNK, LAYOUTS, PIECE, SHAPES, scaled_call
from tests.cpp.kron_batches import ANY_RULE

pytestmark = needs_cpp

RULES = [WHITENED, ROOT_FREE, *MIXED]
STATE = ("param", "square", "buffer", "curvature", "square_residual", "weight_residual")
NOT_EMPTY = [shape for shape in SHAPES if 0 not in shape]  # an empty tensor has no mean
CALLS = st.builds(
    lambda param, grad, **rest: scaled_call(param=param, grad=grad or param, **rest),
    shapes=st.lists(st.one_of(st.sampled_from(NOT_EMPTY), st.integers(1, 1100).map(lambda n: (n,))), min_size=1),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=5).map(tuple),
    param=st.sampled_from([FP32, BF16, FP16]),
    grad=st.sampled_from([None, FP32, FP64]),  # None: the dtype of the parameters
    square=st.sampled_from([FP32, BF16]),
    buffer=st.sampled_from([FP32, BF16]),
    rounding=st.sampled_from(ROUNDINGS),
    weight_rounding=st.sampled_from(ROUNDINGS),
    options=st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([1, 7.5]),
            "beta2": st.sampled_from([0, 0.1, 0.9]),
            "gamma": st.sampled_from([0, 1]),
            "momentum": st.sampled_from([0, 0.9]),
            "damping": st.sampled_from([1e-4, 1]),
            "weight_decay": st.sampled_from([0, 0.1]),
            "decoupled": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
    rule=ANY_RULE,
    lr=st.sampled_from([0, 0.05]),
    grad_scale=st.sampled_from([None, 3.0]),
    found_inf=st.sampled_from([None, 0.0]),
    steps=st.sampled_from([3, 70000]),
    seed=st.integers(0, 99),
)


def kinds(dtype: torch.dtype, rounding: str) -> tuple[Any, ...]:
    return dtype, dtype, dtype, dtype, rounding, rounding


def state(lists: Lists) -> dict[str, list[bytes]]:
    return bits({name: lists[name] for name in STATE})


# ---- the formula -----------------------------------------------------------------------------------------------------


@given(CALLS, st.sampled_from([through("cpp"), dispatched("cpp")]))
@example(scaled_call(NOT_EMPTY, LAYOUTS, rule=WHITENED), through("cpp"))
@example(scaled_call(NOT_EMPTY, LAYOUTS, *kinds(BF16, "stochastic"), rule=WHITENED), through("cpp"))
@example(scaled_call(NOT_EMPTY, LAYOUTS, *kinds(BF16, "compensated"), rule=ROOT_FREE), through("cpp"))
@example(scaled_call(NOT_EMPTY, LAYOUTS[::-1], FP16, FP64, BF16, FP32, "compensated", rule=MIXED[3]), through("cpp"))
@settings(max_examples=80, deadline=None)
def test_step_matches_the_reference(call, run):
    """Gradients, counts of skipped elements and memory around tensors do not change."""
    lists, memory = call.tensors()
    before = copied(lists)
    call.run(lists, run)
    assert_matches_reference(call, lists, before)
    assert_equal({name: lists[name] for name in ("grad", "skipped")}, {n: before[n] for n in ("grad", "skipped")})
    assert_memory_around_is_untouched(memory)


@pytest.mark.parametrize("momentum", [{}, MIXED[3]], ids=["update", "gradient"])
@pytest.mark.parametrize("direction", ["root_free", "whitened"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bf16_is_rounded_bitwise_as_in_eager_pytorch(rounding, direction, momentum):
    """With G = 0 and α₁ = ½, every result is rounded only once. `scales` is off, because norms are not exact."""
    rule = {**momentum, "direction": direction, "scales": False}
    call = scaled_call(NOT_EMPTY, LAYOUTS, *kinds(BF16, rounding), exact=True, rule=rule)
    lists, was = call.run(), call.tensors()[0]
    assert_equal(lists, call.run(run=through("eager")))
    assert rounding == "nearest" or not torch.equal(lists["square"][-1], was["square"][-1])
    if rounding == "stochastic":
        other = replace(call, steps=9).run()
        assert not torch.equal(lists["param"][-1], other["param"][-1])


def test_u_uses_the_stored_s():
    """s = 1 + 2⁻⁹ is stored as 1 in BF16. Without damping, u then equals M′."""
    options = {"beta2": 2.0**-9, "gamma": 0.0, "batch_size": 1.0, "momentum": 0.0, "damping": 0.0, "weight_decay": 0.0}
    call = scaled_call([PIECE + 3], square=BF16, options=options, lr=1.0, rule={**MIXED[3], "scales": False})
    lists = call.tensors()[0]
    for name in ("square", "grad"):
        lists[name][0].fill_(1)
    lists["param"][0].zero_()
    call.run(lists)
    assert (lists["square"][0] == 1).all() and (lists["param"][0] == -1).all()


@pytest.mark.parametrize("rule", [WHITENED, {**MIXED[1], "momentum_on": "update"}], ids=["gradient", "update"])
def test_updates_have_the_given_norms(rule):
    options = {"momentum": 0.0, "weight_decay": 0.0}
    call = scaled_call([5, 3 * CHUNK + 5, (17, 130)], options=options, lr=1.0, rule=rule)
    lists, was = call.run(), call.tensors()[0]
    norms = [float((x.double() - y.double()).norm()) for x, y in zip(lists["param"], was["param"], strict=True)]
    assert norms == pytest.approx(call.norms.tolist(), rel=1e-5)


# ---- skipped tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 1e30])
@pytest.mark.parametrize("place", [0, CHUNK + 3], ids=str)
def test_a_tensor_whose_gradient_is_not_finite_is_skipped_and_counted(place, bad, rule):
    """1e30 is finite, but its square is not. Other tensors step."""
    call = scaled_call([40, 2 * CHUNK + 7, 9], LAYOUTS[:1], *kinds(BF16, "compensated"), rule=rule)
    lists, before, clean = call.tensors()[0], call.tensors()[0], call.run()
    lists["grad"][1][place] = bad
    call.run(lists)
    for name in STATE:
        for index, x in enumerate(lists[name]):
            assert same_bits(x, (before if index == 1 else clean)[name][index]), f"{name}[{index}]"
    assert counts(lists) == [0, 2, 2]  # they started at 0, 1, 2


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", [WHITENED, MIXED[2]], ids=["whitened", "mixed"])
def test_found_inf_skips_and_counts_everything(rule, rounding):
    for found_inf in (1.0, torch.nan):
        call = scaled_call([2210, 1, CHUNK], LAYOUTS[:1], *kinds(BF16, rounding), found_inf=found_inf, rule=rule)
        before, lists = call.tensors()[0], call.run()
        assert state(lists) == state(before) and counts(lists) == [1, 2, 3]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_zero_gradient_keeps_s_and_q_and_continues_the_momentum(dtype, rounding):
    """The first tensor has had no nonzero gradient yet. The second has."""
    call = scaled_call([700, 700], LAYOUTS[:1], *kinds(dtype, rounding), rule=WHITENED)
    lists = call.tensors()[0]
    for grad in lists["grad"]:
        grad.zero_()
    before = copied(lists)
    call.run(lists)
    assert_matches_reference(call, lists, before)
    waiting = ("square", "curvature", "square_residual", "skipped")
    assert bits({name: lists[name] for name in waiting}) == bits({name: before[name] for name in waiting})
    assert not any(map(torch.equal, lists["buffer"], before["buffer"]))


@pytest.mark.parametrize("direction", ["root_free", "whitened"])
def test_elements_of_u_that_are_not_finite_count_as_0_and_the_step_is_counted(direction):
    """Examples are 0/0 and an overflow."""
    options = {"damping": 0.0, "weight_decay": 0.0, "beta2": 0.0}
    call = scaled_call([PIECE + 3], options=options, rule={**MIXED[3], "direction": direction})
    lists = call.tensors()[0]
    lists["square"][0][[7, 8]] = torch.tensor([0.0, 1e-45])
    lists["buffer"][0][[7, 8]] = torch.tensor([0.0, 1e38])
    lists["grad"][0][7] = 0.0
    before = copied(lists)
    call.run(lists)
    same = lists["param"][0] == before["param"][0]
    assert same[[7, 8]].all() and not same[:7].any() and lists["param"][0].isfinite().all()
    assert counts(lists) == [1]


def test_an_update_of_0_stays_0():
    call = scaled_call([PIECE + 3], options={"weight_decay": 0.0}, rule=WHITENED)
    lists = call.tensors()[0]
    lists["grad"][0].zero_()
    lists["buffer"][0].zero_()
    before = copied(lists)
    call.run(lists)
    assert state(lists) == state(before) and counts(lists) == [0]


@pytest.mark.parametrize("rule", [WHITENED, MIXED[0]], ids=["gradient", "update"])
def test_a_weight_that_is_not_finite_does_not_spread_without_weight_decay(rule):
    call = scaled_call([5], options={"weight_decay": 0.0}, rule=rule)
    lists = call.tensors()[0]
    lists["param"][0][2] = -torch.inf
    call.run(lists)
    assert lists["param"][0][2] == -torch.inf and lists["buffer"][0].isfinite().all()


# ---- strides, sizes, threads, arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize("layouts", [*((layout,) for layout in LAYOUTS[3:]), LAYOUTS], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_strides_do_not_change_the_result(layouts, rounding):
    """Random bits depend on the row-major index. Sums depend on the order in memory, so the rule has no norms."""
    rule = {**WHITENED, "scales": False, "relative_damping": False, "factor_init": "identity"}
    shapes = [(17, 130), (130, 17), (2, 3, 4), (6, 5, 3, 7)]
    call = scaled_call(shapes, LAYOUTS[:1], *kinds(BF16, rounding), rule=rule)
    assert_equal(flat(replace(call, layouts=layouts).run()), flat(call.run()))


def test_negated_gradients_are_read():
    """Gradients of complex tensors can be views whose memory is negated when it is read."""
    call = scaled_call([(17, 130), (5,)], rule=WHITENED)
    lazy, whole = call.tensors()[0], call.tensors()[0]
    lazy["grad"] = [torch._neg_view(-x) for x in whole["grad"]]
    assert_equal({**call.run(lazy), "grad": []}, {**call.run(whole), "grad": []})


def test_gradients_may_have_several_dtypes():
    call = scaled_call([5, 700, 9, 2], rule=WHITENED)
    mixed, wide = call.tensors()[0], call.tensors()[0]
    mixed["grad"] = [grad.to(dtype) for grad, dtype in zip(mixed["grad"], (FP32, BF16, FP16, FP64), strict=True)]
    wide["grad"] = [grad.float() for grad in mixed["grad"]]
    assert_equal({**call.run(mixed), "grad": []}, {**call.run(wide), "grad": []})


def test_a_list_of_tensors_steps_as_single_tensors_do():
    call = scaled_call([1 + i % 7 for i in range(500)], LAYOUTS[:1], *kinds(BF16, "stochastic"), rule=WHITENED)
    together, alone = call.tensors()[0], call.tensors()[0]
    call.run(together)
    arguments = call.arguments(alone)
    for i in range(500):
        own = [x[i : i + 1] if isinstance(x, list) else x for x in arguments]
        own[7] = own[7][i : i + 1]  # norms
        own[10:12] = [x[i : i + 1] for x in own[10:12]]  # seeds and steps
        through("cpp")("scaled_rmsprop", *own)
    assert_equal({**together, "grad": []}, {**alone, "grad": []})


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(dtype, rule):
    call = scaled_call([40_000, 3, 70_001, 33_000, 5 * CHUNK], LAYOUTS[:1], *kinds(dtype, "stochastic"), rule=rule)
    results = []
    for number in (1, 2, 3):
        lists = call.tensors()[0]
        lists["grad"][2][69_999] = torch.nan
        with threads(number):
            results.append(bits(call.run(lists)))
        assert counts(lists) == [0, 1, 3, 3, 4]  # they started at 0, 1, 2, …
    assert results[0] == results[1] == results[2]


def test_empty_lists_and_tensors_are_allowed():
    scaled_call([], rule=WHITENED).run()
    assert counts(scaled_call([(0, 3), (0,)], rule=WHITENED).run()) == [0, 1]


@pytest.mark.parametrize("change", [{"param": FP64}, {"square": FP64}, {"buffer": FP16}], ids=str)
def test_unsupported_dtypes_are_an_error(change):
    ((name, dtype),) = change.items()
    with pytest.raises(ValueError, match=rf"{name}s of {dtype}: pass tensors of one dtype, torch.float32 or "):
        scaled_call(**change).run()


def test_changed_tensors_get_a_new_version():
    call = scaled_call([5, 70], ("whole", "every other"), *kinds(BF16, "compensated"), rule=WHITENED)
    lists = call.tensors()[0]
    before = {name: [x._version for x in tensors] for name, tensors in lists.items()}
    call.run(lists)
    for name, tensors in lists.items():
        assert all((x._version > old) == (name != "grad") for x, old in zip(tensors, before[name], strict=True)), name


def test_inference_tensors_can_be_stepped():
    call = scaled_call([(17, 130), (6, 5, 3, 7)], layouts=LAYOUTS, rule=WHITENED)
    with torch.inference_mode():
        lists = call.run()
    assert lists["param"][0].is_inference()
    assert_equal(lists, call.run())


@pytest.mark.parametrize(("position", "name"), [(1, "squares"), (4, "curvatures"), (8, "grads"), (7, "update_norms")])
def test_lists_that_do_not_fit_are_an_error_before_anything_changes(position, name):
    call: ScaledCall = scaled_call([4, 5], rule=WHITENED)
    lists, before = call.tensors()[0], call.tensors()[0]
    arguments = [*call.arguments(lists)]
    arguments[position] = arguments[position][:1]
    with pytest.raises(ValueError, match=f"1 {name} for 2 parameters: pass one for each"):
        through("cpp")("scaled_rmsprop", *arguments)
    assert bits(lists) == bits(before)
