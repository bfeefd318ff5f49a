"""The diagonal step in C++: strides, sizes, threads and other arguments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.calls.cpu import needs_cpp, threads
from tests.calls.operators import through
from tests.calls.rf_rmsprop import assert_equal, bits, counts, flat
from tests.calls.tensors import BF16, FP16, FP32, FP64, ROUNDINGS
from tests.cpp.calls import CHUNK, LAYOUTS, cpp_call

pytestmark = needs_cpp


# ---- strides, sizes, threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layouts", [*((layout,) for layout in LAYOUTS[3:]), LAYOUTS, ("transposed", "whole")], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_strides_do_not_change_the_result(layouts, rounding):
    """Weight, gradient and state may have different strides. Random bits depend on the row-major index."""
    kinds = (BF16, BF16, BF16, BF16, rounding, rounding)
    call = cpp_call([(17, 130), (130, 17), (2, 3, 4), (6, 5, 3, 7)], LAYOUTS[:1], *kinds)
    assert_equal(flat(replace(call, layouts=layouts).run()), flat(call.run()))


def test_expanded_gradients_are_read():
    """Gradients of `param.sum()` have strides of 0."""
    call = cpp_call([(17, 130), (5,)])
    spread, whole = call.tensors()[0], call.tensors()[0]
    spread["grad"] = [torch.tensor(0.7).expand(shape) for shape in call.shapes]
    whole["grad"] = [x.contiguous() for x in spread["grad"]]
    assert_equal({**call.run(spread), "grad": []}, {**call.run(whole), "grad": []})


def test_gradients_may_have_several_dtypes():
    call = cpp_call([5, 700, 9, 2])
    mixed, wide = call.tensors()[0], call.tensors()[0]
    mixed["grad"] = [grad.to(dtype) for grad, dtype in zip(mixed["grad"], (FP32, BF16, FP16, FP64), strict=True)]
    wide["grad"] = [grad.float() for grad in mixed["grad"]]
    assert_equal({**call.run(mixed), "grad": []}, {**call.run(wide), "grad": []})


def test_a_list_of_ten_thousand_tensors_steps_as_single_tensors_do():
    call = cpp_call([i % 7 for i in range(10_000)], LAYOUTS[:1], BF16, BF16, BF16, BF16, "stochastic", "stochastic")
    together, alone = call.tensors()[0], call.tensors()[0]
    together["grad"][5][1] = alone["grad"][5][1] = torch.nan
    call.run(together)
    arguments = call.arguments(alone)
    for i in range(10_000):
        own = [x[i : i + 1] if isinstance(x, list) else x for x in arguments]
        own[8:10] = [x[i : i + 1] for x in own[8:10]]  # seeds and steps
        through("cpp")("rf_rmsprop", *own)
    assert_equal({**together, "grad": []}, {**alone, "grad": []})
    assert counts(together)[4:7] == [4, 6, 6]  # they started at 4, 5, 6


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(dtype):
    kinds = (dtype, dtype, dtype, dtype, "stochastic", "stochastic")
    call = cpp_call([40_000, 3, 70_001, 0, 33_000, 5 * CHUNK], LAYOUTS[:1], *kinds)
    results = []
    for number in (1, 2, 3):
        lists = call.tensors()[0]
        lists["grad"][2][69_999] = torch.nan
        with threads(number):
            results.append(bits(call.run(lists)))
        assert counts(lists) == [0, 1, 3, 3, 4, 5]  # they started at 0, 1, 2, …
    assert results[0] == results[1] == results[2]


def test_empty_lists_and_tensors_are_allowed():
    cpp_call([]).run()
    assert counts(cpp_call([(0, 3), (0,)]).run()) == [0, 1]


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_a_tensor_with_one_element_of_any_dtype():
    call = cpp_call([(17, 130), ()], lr=0.125)
    expected = call.run()
    for lr in (torch.tensor(0.125, dtype=FP64), torch.tensor([0.125]), torch.tensor(0.125, dtype=BF16)):
        assert_equal(replace(call, lr=lr).run(), expected)


@pytest.mark.parametrize("change", [{"param": FP64}, {"square": FP64}, {"buffer": FP16}], ids=str)
def test_unsupported_dtypes_are_an_error(change):
    ((name, dtype),) = change.items()
    with pytest.raises(ValueError, match=rf"{name}s of {dtype}: pass tensors of one dtype, torch.float32 or "):
        cpp_call(**change).run()


def test_changed_tensors_get_a_new_version():
    call = cpp_call([5, 70], ("whole", "every other"), BF16, BF16, BF16, BF16, "compensated", "compensated")
    lists = call.tensors()[0]
    before = {name: [x._version for x in tensors] for name, tensors in lists.items()}
    call.run(lists)
    for name, tensors in lists.items():
        assert all((x._version > old) == (name != "grad") for x, old in zip(tensors, before[name], strict=True)), name


def test_inference_tensors_can_be_stepped():
    call = cpp_call([(17, 130), (6, 5, 3, 7)], layouts=LAYOUTS)
    with torch.inference_mode():
        lists = call.run()
    assert lists["param"][0].is_inference()
    assert_equal(lists, call.run())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("squares", lambda x: [x[0][:2]]),
        ("grads", lambda x: []),
        ("skipped", lambda x: [x[0].long()]),
        ("square_residuals", lambda x: [torch.zeros(3, dtype=torch.int16)] * 2),
    ],
    ids=["shape", "length", "dtype", "residuals"],
)
def test_lists_that_do_not_fit_are_an_error_before_anything_changes(name, wrong):
    lists = {x: [torch.ones(4)] for x in ("params", "squares", "buffers")}
    lists |= {"skipped": [torch.zeros((), dtype=torch.int32)], "square_residuals": [], "weight_residuals": []}
    lists["grads"] = [torch.ones(4)]
    before = lists["params"][0].clone()
    lists[name] = wrong(lists[name])
    scalars = (torch.tensor(0.1), torch.zeros(1, dtype=torch.int32), torch.zeros(1), None, None)
    numbers = (1.0, 0.1, 1.0, 0.9, 0.1, 0.0, False, False, "nearest", "nearest")
    params = lists["params"]
    with pytest.raises(
        (ValueError, RuntimeError), match=r"pass (tensors of one shape|one for each)|expected scalar type"
    ):
        through("cpp")("rf_rmsprop", *lists.values(), *scalars, *numbers)
    assert torch.equal(params[0], before)
