"""The CUDA kernel of the diagonal step, compiled for the CPU by a C++ compiler (see on_cpu/).

Results are compared with the FP64 reference, and bitwise with FP32 arithmetic in PyTorch.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rootfree_kernels.pointer_tables.rf_rmsprop import GRAD_DTYPES, STATE_DTYPES
from tests.calls.operators import through
from tests.calls.rf_rmsprop import LISTS, OPTIONS, assert_equal, assert_matches_reference, copied, counts, fp32_step
from tests.calls.rf_rmsprop import Call as cuda_call
from tests.calls.tensors import BF16, FP16, FP32, ROUNDINGS, assert_memory_around_is_untouched
from tests.cuda.on_cpu.library import CHUNK

DTYPES = [
    (param, grad, s, m)
    for param in GRAD_DTYPES
    for grad in GRAD_DTYPES[param]
    for s, m in product(STATE_DTYPES, repeat=2)
]
SIZES = [0, 1, 4, 13, 1031, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 12]
LAYOUTS = ("whole", "offset by 1", "offset by 8")


def modes(param, square):
    """Return all pairs of rounding modes for s and the weights."""
    return product(*(ROUNDINGS if dtype == BF16 else ["nearest"] for dtype in (square, param)))


# ---- the formula -----------------------------------------------------------------------------------------------------


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


@st.composite
def calls(draw):
    dtypes = draw(st.sampled_from(DTYPES))
    sizes = st.lists(st.one_of(st.sampled_from(SIZES), st.integers(0, CHUNK + 40)), min_size=1, max_size=4)
    return cuda_call(
        *(draw(sizes), tuple(draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3))), *dtypes),
        *(draw(st.sampled_from(ROUNDINGS)), draw(st.sampled_from(ROUNDINGS)), draw(ANY_OPTIONS)),
        lr=draw(st.sampled_from([0, 0.05])),
        grad_scale=draw(st.sampled_from([None, 3.0])),
        found_inf=draw(st.sampled_from([None, 0.0])),
        seed=draw(st.integers(0, 99)),
        apart=draw(st.sampled_from(["", *LISTS])),
    )


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@given(calls())
@example(cuda_call(SIZES, LAYOUTS))
@example(cuda_call(SIZES, LAYOUTS, BF16, BF16, BF16, BF16, "stochastic", "stochastic"))
@example(cuda_call(SIZES, LAYOUTS, BF16, FP32, BF16, FP32, "compensated", "compensated"))
@settings(max_examples=100, deadline=None)
def test_step_matches_the_reference_and_writes_nothing_else(cuda, call):
    lists, memory = call.tensors()
    before = copied(lists)
    made = cuda.rf_rmsprop(*call.arguments(lists))
    assert_matches_reference(call, lists, before)
    assert_equal({name: lists[name] for name in ("grad", "skipped")}, {n: before[n] for n in ("grad", "skipped")})
    assert not made.where.counters.any()
    assert_memory_around_is_untouched(memory)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(x).removeprefix("torch.") for x in dtypes))
def test_fp32_arithmetic_and_rounding_are_bitwise_correct(cuda, dtypes):
    """The CPU build fuses no operations. One element of a gradient is not finite."""
    for number, (rounding, weight_rounding) in enumerate(modes(dtypes[0], dtypes[2])):
        options = {"decoupled": number % 2 == 0, "maximize": number % 3 == 0}
        kinds = (*dtypes, rounding, weight_rounding, options)
        call = cuda_call([CHUNK + 9, 70], LAYOUTS[:2], *kinds, steps=number, grad_scale=3.0)
        lists, expected = call.tensors()[0], call.tensors()[0]
        for x in (lists, expected):
            x["grad"][0][number] = torch.inf
        cuda.rf_rmsprop(*call.arguments(lists))
        assert_equal(lists, fp32_step(call, expected))


@pytest.mark.parametrize("steps", [3, 70000, 2**24 + 1, 2**31 + 5, 2**32 + 7, "each its own"], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bf16_is_rounded_bitwise_as_in_eager_pytorch(cuda, rounding, steps):
    if steps == "each its own":
        steps = 2**31 - 2 + torch.arange(len(SIZES) - 1)
    call = cuda_call(SIZES[1:], LAYOUTS, BF16, BF16, BF16, BF16, rounding, rounding, steps=steps, exact=True)
    assert_equal(call.run(run=cuda.run), call.run(run=through("eager")))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_16_bit_values_are_read_exactly_and_rounded_half_to_even(cuda, dtype):
    """One step sets the weights to −g. Another keeps them, with a learning rate of 0."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    pattern = torch.randint(-(2**31), 2**31, (30000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    near = every.double()[:-1] + every.double().diff() / 2  # ties between neighbours
    values = torch.cat([every.float(), pattern.int().view(FP32), near.float()])
    values = values[values.isfinite()]
    call = cuda_call([len(values)], param=dtype, options=dict.fromkeys(OPTIONS, 0.0), lr=1.0)
    lists = call.tensors()[0]
    for name, value in (("param", torch.zeros(())), ("square", torch.ones(())), ("grad", values)):
        lists[name][0].copy_(value)
    call.run(lists, cuda.run)
    assert torch.equal(lists["param"][0], (-values).to(dtype))
    lists["param"][0][: len(every)] = every
    replace(call, lr=0.0).run(lists, cuda.run)
    assert torch.equal(lists["param"][0][: len(every)], every)


@pytest.mark.parametrize("name", LISTS)
def test_an_unaligned_tensor_does_not_change_the_result(cuda, name):
    """An unaligned 128-bit access would crash this test, as it would a kernel on a GPU."""
    call = cuda_call([CHUNK + 9], LAYOUTS[:1], BF16, BF16, BF16, BF16, "compensated", "compensated")
    assert_equal(replace(call, apart=name).run(run=cuda.run), call.run(run=cuda.run))


# ---- skipped elements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 1e30])
@pytest.mark.parametrize("place", [0, CHUNK + 5, 3 * CHUNK + 6], ids=["first", "middle", "last"])
def test_an_element_that_is_not_finite_is_skipped_and_counted_once(cuda, bad, place):
    """1e30 is finite, but its square is not. The step resets the counters of programs that skipped elements to 0."""
    call = cuda_call([40, 3 * CHUNK + 7, 9], param=BF16, weight_rounding="compensated")
    lists, before, expected = call.tensors()[0], call.tensors()[0], call.run(run=cuda.run)
    lists["grad"][1][place] = bad
    made = cuda.rf_rmsprop(*call.arguments(lists))
    changed = ("param", "square", "buffer", "weight_residual")
    for name in changed:
        expected[name][1][place] = before[name][1][place]
    assert_equal(lists, {name: expected[name] for name in changed})
    for replay in (3, 4):
        assert counts(lists) == [0, replay - 1, 2] and not made.where.counters.any()  # they started at 0, 1, 2
        cuda.launch_diagonal(made)


def test_found_inf_skips_and_counts_every_block(cuda):
    for found_inf in (1.0, torch.nan):
        call = cuda_call([2210, 1, CHUNK], ("whole", "offset by 1"), found_inf=found_inf)
        before = call.tensors()[0]
        assert_equal(call.run(run=cuda.run), {**before, "skipped": [x + 1 for x in before["skipped"]]})


def test_zero_damping_and_zero_curvature_skips_an_element(cuda):
    """Its update would be 0/0. Eager PyTorch skips it too."""
    call = cuda_call([CHUNK + 3], options={"damping": 0.0})
    lists = call.tensors()[0]
    for name in ("grad", "square"):
        lists[name][0][7] = 0.0
    weight = lists["param"][0][7].item()
    call.run(lists, cuda.run)
    assert lists["param"][0][7] == weight and counts(lists) == [1]


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_that_is_not_finite_does_not_spread_without_weight_decay(cuda, decoupled):
    call = cuda_call([5], options={"weight_decay": 0.0, "decoupled": decoupled})
    lists = call.tensors()[0]
    lists["param"][0][2] = -torch.inf
    call.run(lists, cuda.run)
    assert lists["param"][0][2] == -torch.inf and lists["buffer"][0].isfinite().all()


# ---- launches --------------------------------------------------------------------------------------------------------


def test_a_learning_rate_on_the_device_acts_like_a_number(cuda):
    call = cuda_call([CHUNK + 3], lr=0.125)
    lists = call.tensors()[0]
    made = cuda.diagonal_call(*call.arguments(lists))
    cuda.launch_diagonal(made._replace(lr=torch.tensor(0.125), lr_value=0.0))
    assert_equal(lists, call.run(run=cuda.run))


def test_hundreds_of_tensors_need_one_launch_and_step_as_single_tensors_do(cuda):
    call = cuda_call([*range(200), 7 * CHUNK + 1], LAYOUTS, BF16, BF16)
    before, lists = cuda.num_launches, call.run(run=cuda.run)
    assert cuda.num_launches == before + 1
    assert_equal(lists, fp32_step(call, call.tensors()[0]))
    cuda_call([]).run(run=cuda.run)
    cuda_call([0, 0]).run(run=cuda.run)
    assert cuda.num_launches == before + 1


def test_the_order_of_threads_and_programs_does_not_matter(cuda):
    call = cuda_call(SIZES, LAYOUTS, BF16, BF16, BF16, BF16, "stochastic", "stochastic")
    lists = call.tensors()[0]
    lists["grad"][-1][CHUNK + 5] = torch.nan
    other = copied(lists)
    call.run(lists, cuda.run)
    cuda.run_backwards(True)
    try:
        call.run(other, cuda.run)
    finally:
        cuda.run_backwards(False)
    assert_equal({**lists, "grad": []}, {**other, "grad": []})
    assert counts(lists)[-2:] == [8, 10]  # they started at 8 and 9


def test_offsets_are_64_bits_and_indices_of_random_bits_wrap_around(cuda):
    """Simulate a tensor with 2³² more elements, of which only the last exist: addresses start 2³² elements earlier."""
    kinds, missing = (BF16, BF16, BF16, BF16, "stochastic", "stochastic"), 2**32
    call = cuda_call([2 * CHUNK - 5], LAYOUTS[:1], *kinds, exact=True)
    lists = call.tensors()[0]
    made = cuda.diagonal_call(*call.arguments(lists))
    longer = torch.tensor([-2 * missing] * 3 + [0, 0, 0, missing, -missing // CHUNK])
    where = made.where._replace(rows=made.where.rows + longer)
    cuda.launch_diagonal(made._replace(where=where, grads=made.grads - 2 * missing))
    assert_equal({**lists, "skipped": []}, {**call.run(run=through("eager")), "skipped": []})
