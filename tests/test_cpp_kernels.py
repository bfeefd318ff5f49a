"""The diagonal step in C++: against the FP64 reference, and to the bit against FP32 arithmetic in PyTorch, whatever the
strides, the number of threads and the instruction set."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import product
from typing import Any

import pytest
import torch
from conftest import same_bits
from cpp_calls import (
    LAYOUTS,
    Call,
    assert_memory_around_is_untouched,
    bits,
    cpp,
    flat,
    needs_cpp,
    step,
    threads,
    under_other_instruction_sets,
    whole_numbers,
)
from cuda_on_cpu import calls
from cuda_on_cpu.calls import BF16, FP16, FP32, OPTIONS, assert_equal, counts, fp32_step
from cuda_on_cpu.sides import clones
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rootfree_kernels import eager
from rootfree_kernels.rounding import join_compensated, split_compensated

pytestmark = needs_cpp

FP64 = torch.float64
PIECE, CHUNK = 512, 1 << 14
"""Numbers that a kernel works on at a time, and that a thread takes at a time."""

ROUNDINGS = ("nearest", "stochastic", "compensated")
CLIPS = ("frobenius", "row_sum", "none")
SHAPES = [
    *[(), (0,), (1,), (3, 0, 2), (13,), (PIECE - 1,), (PIECE,), (PIECE + 1,), (1031,)],
    *[(CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (17, 130), (2, 3, 4), (6, 5, 3, 7), (2, CHUNK + 3)],
]


@dataclass
class ExactCall(Call):
    """All arithmetic is exact in FP32: rounding alone decides the result."""

    options: dict[str, Any] = field(default_factory=lambda: calls.EXACT)
    lr: Any = 2.0**-11
    draw = calls.ExactCall.draw


# ---- the formula ---------------------------------------------------------------------------------------------------

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
    lambda param, grad, **rest: Call(param=param, grad=grad or param, **rest),
    shapes=st.lists(st.one_of(st.sampled_from(SHAPES), st.integers(0, 1100).map(lambda n: (n,))), min_size=1),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=5).map(tuple),
    param=st.sampled_from([FP32, BF16, FP16]),
    grad=st.sampled_from([None, FP32, FP64]),  # None: the parameters' own
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


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@given(CALLS)
@example(Call(shapes=SHAPES, layouts=LAYOUTS))
@example(Call([5], [0], BF16, BF16, BF16, BF16, "stochastic", "stochastic", shapes=SHAPES, layouts=LAYOUTS))
@example(Call([5], [0], BF16, FP32, BF16, FP32, "compensated", "compensated", shapes=SHAPES, layouts=LAYOUTS))
@example(Call([5], [0], FP16, FP64, BF16, FP32, "compensated", "nearest", shapes=SHAPES, layouts=LAYOUTS[::-1]))
@settings(max_examples=150, deadline=None)
def test_a_step_is_the_reference_s_and_to_the_bit_that_of_fp32_arithmetic(call):
    """And what it is not to change stays as it was: gradients, counts of what was skipped, the memory around."""
    lists, memory = call.tensors()
    before = flat(lists)
    call.run(step, lists)
    shaped = {name: [x.view(y.shape) for x, y in zip(before[name], lists[name], strict=True)] for name in lists}
    calls.assert_is_the_reference_s(call, lists, shaped)
    after = flat(lists)
    assert_equal({name: after[name] for name in ("grad", "skipped")}, {n: before[n] for n in ("grad", "skipped")})
    assert_memory_around_is_untouched(memory)
    assert_equal(after, fp32_step(call, before))


@pytest.mark.parametrize("steps", [3, 70000, "each its own"], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bf16_is_rounded_as_in_eager_pytorch_to_the_bit(rounding, steps):
    shapes = [shape for shape in SHAPES if 0 not in shape]  # eager PyTorch has no norm of nothing
    if steps == "each its own":
        steps = torch.arange(float(len(shapes)))
    kinds = (BF16, BF16, BF16, BF16, rounding, rounding)
    call = ExactCall([5], [0], *kinds, steps=steps, shapes=shapes, layouts=LAYOUTS)
    assert_equal(call.run(step), call.run(eager.rf_rmsprop))
    if rounding == "stochastic":
        other = replace(call, steps=9).run(step)
        assert not torch.equal(call.run(step)["param"][-1], other["param"][-1])


def test_compensated_pairs_are_an_fp32_run_to_the_bit():
    wide_call = Call(shapes=SHAPES)
    pairs_call = replace(wide_call, param=BF16, square=BF16, rounding="compensated", weight_rounding="compensated")
    wide, pairs = wide_call.tensors()[0], pairs_call.tensors()[0]
    for name, residual in (("param", "weight_residual"), ("square", "square_residual")):
        splits = [split_compensated(x) for x in wide[name]]
        pairs[name], pairs[residual] = map(list, zip(*splits, strict=True))
    pairs["grad"], pairs["buffer"] = clones(wide["grad"]), clones(wide["buffer"])
    for _ in range(3):
        wide_call.run(step, wide)
        pairs_call.run(step, pairs)
    for name, residual in (("param", "weight_residual"), ("square", "square_residual")):
        joined = [join_compensated(*pair) for pair in zip(pairs[name], pairs[residual], strict=True)]
        assert all(map(same_bits, joined, wide[name])), name
    assert_equal(pairs, {"buffer": wide["buffer"]})


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def to_be_rounded(dtype: torch.dtype) -> Tensor:
    """Finite FP32 numbers: all of a dtype, what lies halfway between neighbours, what lies beside that, any others."""
    every = every_pattern(dtype)
    every = every[every.isfinite()].double().sort().values
    ties = ((every[1:] + every[:-1]) / 2).float()
    beside = [torch.nextafter(ties, torch.tensor(bound)) for bound in (torch.inf, -torch.inf)]
    any_bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    edge = torch.tensor([65504.0, 65519.99, 65520.0, 1e30, 3.4028235e38, 2.0**-25, 2.0**-24, 1e-45])
    values = torch.cat([every.float(), ties, *beside, any_bits.int().view(FP32), edge, -edge])
    return values[values.isfinite()]


def rounding_step(dtype: torch.dtype, lr: float, gradient: Tensor) -> tuple[Call, calls.Lists]:
    """A call that takes weights of 0 to −`lr` · gradient, and where lr is 0 leaves any weights where they are."""
    call = Call([len(gradient)], param=dtype, options=dict.fromkeys(OPTIONS, 0.0), lr=lr)
    lists = call.tensors()[0]
    lists["param"][0].zero_()
    lists["square"][0].fill_(1)
    lists["grad"][0].copy_(gradient)
    return call, lists


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_fp32_is_rounded_to_16_bits_as_pytorch_does_it(dtype):
    values = to_be_rounded(dtype)
    call, lists = rounding_step(dtype, 1.0, values)
    call.run(step, lists)
    assert torch.equal(lists["param"][0], (-values).to(dtype)) and counts(lists) == [0]


@pytest.mark.parametrize(("dtype", "rounding"), [(FP16, "nearest"), *product([BF16], ROUNDINGS)], ids=str)
def test_every_number_of_16_bits_is_read_and_written_unchanged(dtype, rounding):
    """NaNs stay NaNs; their payload may go."""
    call, lists = rounding_step(dtype, 0.0, torch.ones(2**16))
    call = replace(call, weight_rounding=rounding)
    lists["param"][0].copy_(every_pattern(dtype))
    if rounding == "compensated":
        lists["weight_residual"] = [torch.zeros(2**16, dtype=torch.int16)]
    call.run(step, lists)
    actual, expected = lists["param"][0], every_pattern(dtype)
    number = ~expected.isnan()
    assert same_bits(actual[number], expected[number]) and actual[~number].isnan().all()


# ---- strides, sizes, threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layouts", [*((layout,) for layout in LAYOUTS[3:]), LAYOUTS, ("transposed", "whole")], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_strides_do_not_change_the_result(layouts, rounding):
    """Also where those of weight, gradient and state differ. Random bits belong to a row-major index."""
    kinds = (BF16, BF16, BF16, BF16, rounding, rounding)
    call = Call([5], [0], *kinds, shapes=[(17, 130), (130, 17), (2, 3, 4), (6, 5, 3, 7)])
    assert_equal(flat(replace(call, layouts=layouts).run(step)), flat(call.run(step)))


def test_gradients_that_repeat_one_number_are_read():
    """Those of `param.sum()` have strides of 0."""
    call = Call(shapes=[(17, 130), (5,)])
    spread, whole = call.tensors()[0], call.tensors()[0]
    spread["grad"] = [torch.tensor(0.7).expand(shape) for shape in call.shapes]
    whole["grad"] = [x.contiguous() for x in spread["grad"]]
    assert_equal({**call.run(step, spread), "grad": []}, {**call.run(step, whole), "grad": []})


def test_gradients_of_several_dtypes_are_served_together():
    call = Call([5, 700, 9, 2])
    mixed, wide = call.tensors()[0], call.tensors()[0]
    mixed["grad"] = [grad.to(dtype) for grad, dtype in zip(mixed["grad"], (FP32, BF16, FP16, FP64), strict=True)]
    wide["grad"] = [grad.float() for grad in mixed["grad"]]
    assert_equal({**call.run(step, mixed), "grad": []}, {**call.run(step, wide), "grad": []})


def test_ten_thousand_tiny_tensors_are_stepped_as_each_by_itself():
    call = Call([i % 7 for i in range(10_000)], [0], BF16, BF16, BF16, BF16, "stochastic", "stochastic")
    together, alone = call.tensors()[0], call.tensors()[0]
    together["grad"][5][1] = alone["grad"][5][1] = torch.nan
    call.run(step, together)
    arguments = call.arguments(alone)
    for i in range(10_000):
        own = [x[i : i + 1] if isinstance(x, list) else x for x in arguments]
        own[8:10] = [x[i : i + 1] for x in own[8:10]]  # seeds and steps
        step(*own)
    assert_equal({**together, "grad": []}, {**alone, "grad": []})
    assert counts(together)[4:7] == [4, 6, 6]  # they started at 4, 5, 6


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    kinds = (dtype, dtype, dtype, dtype, "stochastic", "stochastic")
    call = Call([40_000, 3, 70_001, 0, 33_000, 5 * CHUNK], [0], *kinds)
    results = []
    for number in (1, 2, 3):
        lists = call.tensors()[0]
        lists["grad"][2][69_999] = torch.nan
        with threads(number):
            results.append(bits(call.run(step, lists)))
        assert counts(lists) == [0, 1, 3, 3, 4, 5]  # they started at 0, 1, 2, …
    assert results[0] == results[1] == results[2]


def test_nothing_is_done_for_nothing():
    Call([]).run(step)
    assert counts(Call(shapes=[(0, 3), (0,)]).run(step)) == [0, 1]


# ---- numbers that are left out, arguments --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("place", [0, PIECE + 5, CHUNK + 3, 2 * CHUNK + 6], ids=str)
def test_a_number_that_is_not_finite_is_left_out_and_counted_once_a_step(bad, place):
    """1e30 is finite, its square is not."""
    call = Call([40, 2 * CHUNK + 7, 9], param=BF16, weight_rounding="compensated")
    lists, before, expected = call.tensors()[0], call.tensors()[0], call.run(step)
    lists["grad"][1][place] = bad
    call.run(step, lists)
    changed = ("param", "square", "buffer", "weight_residual")
    for name in changed:
        expected[name][1][place] = before[name][1][place]
    assert_equal(lists, {name: expected[name] for name in changed})
    assert counts(lists) == [0, 2, 2]  # they started at 0, 1, 2
    lists["grad"][1].fill_(bad)
    assert counts(call.run(step, lists)) == [0, 3, 2]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_found_inf_leaves_everything_as_it_is_to_the_bit_and_counts_it(rounding):
    for found_inf in (1.0, torch.nan):
        kinds = (BF16, BF16, BF16, BF16, rounding, rounding)
        call = Call([2210, 1, CHUNK], [0], *kinds, found_inf=found_inf)
        before = call.tensors()[0]
        expected = bits({**before, "skipped": [x + 1 for x in before["skipped"]]})
        assert bits(call.run(step)) == expected


def test_no_damping_and_no_curvature_leaves_a_number_out():
    """0/0, as in eager PyTorch."""
    call = Call([PIECE + 3], options={"damping": 0.0})
    lists = call.tensors()[0]
    for name in ("grad", "square"):
        lists[name][0][7] = 0.0
    weight = lists["param"][0][7].item()
    call.run(step, lists)
    assert lists["param"][0][7] == weight and counts(lists) == [1]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_what_is_left_of_another_weight_is_dropped_where_one_was_set_to_0(zero):
    """A negative remainder of ±0 would be NaN."""
    call = Call([5], param=BF16, weight_rounding="compensated", options={"weight_decay": 0.0}, lr=0.0)
    lists = call.tensors()[0]
    lists["param"][0].fill_(zero)
    lists["weight_residual"][0].fill_(-5)
    call.run(step, lists)
    assert not lists["param"][0].any() and not lists["weight_residual"][0].any()


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_that_is_not_finite_poisons_nothing_without_weight_decay(decoupled):
    call = Call([5], options={"weight_decay": 0.0, "decoupled": decoupled})
    lists = call.tensors()[0]
    lists["param"][0][2] = -torch.inf
    call.run(step, lists)
    assert lists["param"][0][2] == -torch.inf and lists["buffer"][0].isfinite().all()


def test_the_learning_rate_is_a_tensor_of_one_number_of_any_dtype():
    call = Call(shapes=[(17, 130), ()], lr=0.125)
    expected = call.run(step)
    for lr in (torch.tensor(0.125, dtype=FP64), torch.tensor([0.125]), torch.tensor(0.125, dtype=BF16)):
        assert_equal(replace(call, lr=lr).run(step), expected)


@pytest.mark.parametrize("change", [{"param": FP64}, {"square": FP64}, {"buffer": FP16}], ids=str)
def test_dtypes_that_no_kernel_serves_are_an_error(change):
    ((name, dtype),) = change.items()
    with pytest.raises(ValueError, match=rf"{name}s of {dtype}: pass tensors of one dtype, torch.float32 or "):
        Call(**change).run(step)


def test_what_changes_says_so_to_autograd():
    call = Call([5, 70], [0], BF16, BF16, BF16, BF16, "compensated", "compensated", layouts=("whole", "every other"))
    lists = call.tensors()[0]
    before = {name: [x._version for x in tensors] for name, tensors in lists.items()}
    call.run(step, lists)
    for name, tensors in lists.items():
        assert all((x._version > old) == (name != "grad") for x, old in zip(tensors, before[name], strict=True)), name


def test_inference_tensors_are_stepped_like_others():
    call = Call(shapes=[(17, 130), (6, 5, 3, 7)], layouts=LAYOUTS)
    with torch.inference_mode():
        lists = call.run(step)
    assert lists["param"][0].is_inference()
    assert_equal(lists, call.run(step))


# ---- instruction sets ----------------------------------------------------------------------------------------------


def digest() -> str:
    """Of all that steps of every dtype and mode, the conversions of 16-bit numbers and momenta come to."""
    results = []
    for param, square, buffer in product([FP32, BF16, FP16], [FP32, BF16], [FP32, BF16]):
        for number, modes in enumerate(product(ROUNDINGS, ROUNDINGS)):
            options = {"decoupled": number % 2 == 0, "maximize": number % 3 == 0}
            grad = (param, FP32)[number % 2]
            call = Call([1031, 70], [0], param, grad, square, buffer, *modes, options, grad_scale=3.0, steps=number)
            lists = call.tensors()[0]
            lists["grad"][0][number] = torch.inf
            results.append(bits(call.run(step, lists)))
    for dtype in (BF16, FP16):
        for lr, gradient in ((0.0, torch.ones(2**16)), (1.0, to_be_rounded(dtype))):
            call, lists = rounding_step(dtype, lr, gradient)
            if lr == 0:
                lists["param"][0].copy_(every_pattern(dtype))
            results.append(bits(call.run(step, lists)))
    for dtype, clip in product([FP32, BF16], CLIPS):
        generator = torch.Generator().manual_seed(0)
        drawn = [whole_numbers((2, n, n), generator) / 2**20 for n in (130, 67, 130, 67)]
        momenta, deltas = [x.to(dtype) for x in drawn[:2]], drawn[2:]
        clips = cpp("clipped_momentum", momenta, deltas, None, 0.3, clip)
        results.append(bits({"m": momenta, "clips": [clips]}))
    return sha256(repr(results).encode()).hexdigest()


def test_the_instruction_set_changes_no_bit():
    others = under_other_instruction_sets("test_cpp_kernels", "digest()")
    assert others or torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    assert set(others.values()) <= {digest()}, others


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
        step(*lists.values(), *scalars, *numbers)
    assert torch.equal(params[0], before)
