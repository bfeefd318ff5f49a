"""The CUDA kernels: on the CPU, as a C++ compiler makes them (cuda_on_cpu/), against the FP64 reference and to the bit
against FP32 arithmetic in PyTorch; on a GPU, where there is one, as users get them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from cuda_on_cpu.calls import (
    BF16,
    FILL,
    FP16,
    FP32,
    OPTIONS,
    Call,
    ExactCall,
    assert_equal,
    assert_is_the_reference_s,
    copied,
    counts,
    fp32_step,
)
from cuda_on_cpu.library import CLIPS, ROUNDINGS, CudaOnCpu, build, why_not
from cuda_on_cpu.sides import assert_is_the_reference_s as assert_momentum_is_the_reference_s
from cuda_on_cpu.sides import clones, sides
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rootfree_kernels import eager
from rootfree_kernels.diagonal import GRAD_DTYPES, STATE_DTYPES, diagonal_call

DTYPES = [
    (param, grad, s, m)
    for param in GRAD_DTYPES
    for grad in GRAD_DTYPES[param]
    for s, m in product(STATE_DTYPES, repeat=2)
]
CHUNK = 2048
SIZES = [0, 1, 4, 13, 1031, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 12]
OFFSETS = [0, 1, 8]
LISTS = ["param", "grad", "square", "buffer", "square_residual", "weight_residual"]


@pytest.fixture(scope="session")
def cuda(tmp_path_factory):
    """The kernels, on the CPU."""
    if reason := why_not():
        pytest.skip(reason)
    library = CudaOnCpu(build(tmp_path_factory.mktemp("cuda_on_cpu")))
    assert library.chunk == CHUNK
    return library


def modes(param, square):
    """Every pair of modes in which s and the weights can be stored."""
    return product(*(ROUNDINGS if dtype == BF16 else ["nearest"] for dtype in (square, param)))


# ---- the diagonal step: the formula ------------------------------------------------------------------------------

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
    return Call(
        *(draw(sizes), draw(st.lists(st.sampled_from(OFFSETS), min_size=1, max_size=3)), *dtypes),
        *(draw(st.sampled_from(ROUNDINGS)), draw(st.sampled_from(ROUNDINGS)), draw(ANY_OPTIONS)),
        lr=draw(st.sampled_from([0, 0.05])),
        grad_scale=draw(st.sampled_from([None, 3.0])),
        found_inf=draw(st.sampled_from([None, 0.0])),
        seed=draw(st.integers(0, 99)),
        apart=draw(st.sampled_from(["", *LISTS])),
    )


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@given(calls())
@example(Call(SIZES, OFFSETS))
@example(Call(SIZES, OFFSETS, BF16, BF16, BF16, BF16, "stochastic", "stochastic"))
@example(Call(SIZES, OFFSETS, BF16, FP32, BF16, FP32, "compensated", "compensated"))
@settings(max_examples=100, deadline=None)
def test_a_step_is_the_reference_s_and_leaves_the_memory_around_alone(cuda, call):
    lists, memory = call.tensors()
    before = copied(lists)
    made = cuda.rf_rmsprop(*call.arguments(lists))
    assert_is_the_reference_s(call, lists, before)
    assert_equal({name: lists[name] for name in ("grad", "skipped")}, {n: before[n] for n in ("grad", "skipped")})
    assert not made.where.counters.any()
    for x, around in memory:
        start = x.storage_offset()
        assert (around[:start] == FILL).all() and (around[start + x.numel() :] == FILL).all()


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(x).removeprefix("torch.") for x in dtypes))
def test_fp32_arithmetic_and_every_rounding_are_right_to_the_bit(cuda, dtypes):
    """No operation is fused on the CPU. One gradient is not finite."""
    for number, (rounding, weight_rounding) in enumerate(modes(dtypes[0], dtypes[2])):
        options = {"decoupled": number % 2 == 0, "maximize": number % 3 == 0}
        call = Call([CHUNK + 9, 70], [0, 1], *dtypes, rounding, weight_rounding, options, steps=number, grad_scale=3.0)
        lists, expected = call.tensors()[0], call.tensors()[0]
        for x in (lists, expected):
            x["grad"][0][number] = torch.inf
        cuda.rf_rmsprop(*call.arguments(lists))
        assert_equal(lists, fp32_step(call, expected))


@pytest.mark.parametrize("steps", [3, 70000, "each its own"], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bf16_is_rounded_as_in_eager_pytorch_to_the_bit(cuda, rounding, steps):
    if steps == "each its own":
        steps = torch.arange(float(len(SIZES) - 1))
    call = ExactCall(SIZES[1:], OFFSETS, BF16, BF16, BF16, BF16, rounding, rounding, steps=steps)
    assert_equal(call.run(cuda.rf_rmsprop), call.run(eager.rf_rmsprop))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_numbers_of_16_bits_are_read_exactly_and_written_half_to_even(cuda, dtype):
    """s and the weights are made to stay, or the weight to become −g."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    pattern = torch.randint(-(2**31), 2**31, (30000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    near = every.double()[:-1] + every.double().diff() / 2  # ties between neighbours
    values = torch.cat([every.float(), pattern.int().view(FP32), near.float()])
    values = values[values.isfinite()]
    call = Call([len(values)], param=dtype, options=dict.fromkeys(OPTIONS, 0.0), lr=1.0)
    lists = call.tensors()[0]
    for name, value in (("param", torch.zeros(())), ("square", torch.ones(())), ("grad", values)):
        lists[name][0].copy_(value)
    call.run(cuda.rf_rmsprop, lists)
    assert torch.equal(lists["param"][0], (-values).to(dtype))
    lists["param"][0][: len(every)] = every
    replace(call, lr=0.0).run(cuda.rf_rmsprop, lists)
    assert torch.equal(lists["param"][0][: len(every)], every)


@pytest.mark.parametrize("name", LISTS)
def test_one_tensor_that_is_not_aligned_changes_nothing(cuda, name):
    """An access of 128 bits that is not aligned would end this test, as it would a kernel."""
    call = Call([CHUNK + 9], [0], BF16, BF16, BF16, BF16, "compensated", "compensated")
    assert_equal(replace(call, apart=name).run(cuda.rf_rmsprop), call.run(cuda.rf_rmsprop))


# ---- the diagonal step: numbers that are left out, launches ---------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 1e30])
@pytest.mark.parametrize("place", [0, CHUNK + 5, 3 * CHUNK + 6], ids=["first", "middle", "last"])
def test_a_number_that_is_not_finite_is_left_out_and_counted_once_a_step(cuda, bad, place):
    """1e30 is finite, its square is not. The counters of the programs that left some out are 0 again afterwards."""
    call = Call([40, 3 * CHUNK + 7, 9], param=BF16, weight_rounding="compensated")
    lists, before, expected = call.tensors()[0], call.tensors()[0], call.run(cuda.rf_rmsprop)
    lists["grad"][1][place] = bad
    made = cuda.rf_rmsprop(*call.arguments(lists))
    changed = ("param", "square", "buffer", "weight_residual")
    for name in changed:
        expected[name][1][place] = before[name][1][place]
    assert_equal(lists, {name: expected[name] for name in changed})
    for replay in (3, 4):
        assert counts(lists) == [0, replay - 1, 2] and not made.where.counters.any()  # they started at 0, 1, 2
        cuda.launch_diagonal(made)


def test_found_inf_leaves_everything_as_it_is_and_counts_it(cuda):
    for found_inf in (1.0, torch.nan):
        call = Call([2210, 1, CHUNK], [0, 1], found_inf=found_inf)
        before = call.tensors()[0]
        assert_equal(call.run(cuda.rf_rmsprop), {**before, "skipped": [x + 1 for x in before["skipped"]]})


def test_no_damping_and_no_curvature_leaves_a_number_out(cuda):
    """0/0, as in eager PyTorch."""
    call = Call([CHUNK + 3], options={"damping": 0.0})
    lists = call.tensors()[0]
    for name in ("grad", "square"):
        lists[name][0][7] = 0.0
    weight = lists["param"][0][7].item()
    call.run(cuda.rf_rmsprop, lists)
    assert lists["param"][0][7] == weight and counts(lists) == [1]


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_that_is_not_finite_poisons_nothing_without_weight_decay(cuda, decoupled):
    call = Call([5], options={"weight_decay": 0.0, "decoupled": decoupled})
    lists = call.tensors()[0]
    lists["param"][0][2] = -torch.inf
    call.run(cuda.rf_rmsprop, lists)
    assert lists["param"][0][2] == -torch.inf and lists["buffer"][0].isfinite().all()


def test_a_learning_rate_on_the_device_is_a_number_s_equal(cuda):
    call = Call([CHUNK + 3], lr=0.125)
    lists = call.tensors()[0]
    made = diagonal_call(cuda._programs_of, *call.arguments(lists))
    cuda.launch_diagonal(made._replace(lr=torch.tensor(0.125), lr_value=0.0))
    assert_equal(lists, call.run(cuda.rf_rmsprop))


def test_hundreds_of_tensors_are_one_launch_and_stepped_as_each_by_itself(cuda):
    call = Call([*range(200), 7 * CHUNK + 1], OFFSETS, BF16, BF16)
    before, lists = cuda.num_launches, call.run(cuda.rf_rmsprop)
    assert cuda.num_launches == before + 1
    assert_equal(lists, fp32_step(call, call.tensors()[0]))
    Call([]).run(cuda.rf_rmsprop)
    Call([0, 0]).run(cuda.rf_rmsprop)
    assert cuda.num_launches == before + 1


def test_the_order_of_threads_and_programs_does_not_matter(cuda):
    call = Call(SIZES, OFFSETS, BF16, BF16, BF16, BF16, "stochastic", "stochastic")
    lists = call.tensors()[0]
    lists["grad"][-1][CHUNK + 5] = torch.nan
    other = copied(lists)
    call.run(cuda.rf_rmsprop, lists)
    cuda.run_backwards(True)
    try:
        call.run(cuda.rf_rmsprop, other)
    finally:
        cuda.run_backwards(False)
    assert_equal({**lists, "grad": []}, {**other, "grad": []})
    assert counts(lists)[-2:] == [8, 10]  # they started at 8 and 9


def test_offsets_are_64_bits_and_indices_of_random_bits_wrap_around(cuda):
    """The end of a tensor, of which only this end exists: its table begins 2³² numbers earlier."""
    call, missing = ExactCall([2 * CHUNK - 5], [0], BF16, BF16, BF16, BF16, "stochastic", "stochastic"), 2**32
    lists = call.tensors()[0]
    made = diagonal_call(cuda._programs_of, *call.arguments(lists))
    longer = torch.tensor([-2 * missing] * 3 + [0, 0, 0, missing, -missing // CHUNK])
    where = made.where._replace(rows=made.where.rows + longer)
    cuda.launch_diagonal(made._replace(where=where, grads=made.grads - 2 * missing))
    assert_equal({**lists, "skipped": []}, {**call.run(eager.rf_rmsprop), "skipped": []})


# ---- the momentum ---------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 3),
    st.lists(st.sampled_from([1, 2, 13, 64, 67, 130]), min_size=1, max_size=3),
    st.sampled_from([FP32, BF16]),
    st.sampled_from(CLIPS),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.sampled_from([1e-3, 0.1, 10.0]),
    st.sampled_from([(0, 0), (8, 8), (1, 1), (0, 1), (1, 0)]),
)
@example(2, [96, 13], FP32, "row_sum", 0.5, 1.0, (0, 0))
@example(1, [64], FP32, "frobenius", 0.5, 1.0, (0, 1))
@example(1, [64], BF16, "row_sum", 0.5, 1.0, (1, 0))
@settings(max_examples=50, deadline=None)
def test_momentum_and_clip_are_the_reference_s(cuda, num_blocks, sizes, dtype, clip, alpha, scale, offsets):
    momenta, deltas = sides(num_blocks, [(n, n) for n in sizes], dtype, scale, offsets)
    old, given_deltas = clones(momenta), clones(deltas)
    clips = cuda.clipped_momentum(momenta, deltas, None, alpha, clip)
    assert_momentum_is_the_reference_s(momenta, deltas, old, clips, alpha, clip)
    assert all(map(torch.equal, deltas, given_deltas))
    for x in (*momenta, *deltas):
        around = x.as_strided((x.numel() + 24,), (1,), 0)
        start = x.storage_offset()
        assert (around[:start] == FILL).all() and (around[start + x.numel() :] == FILL).all()


@pytest.mark.parametrize("clip", ["frobenius", "none"])
@pytest.mark.parametrize("shape", [(1,), (17,), (3 * CHUNK + 5,), (2, 3, 5)], ids=str)
def test_blocks_may_have_any_number_of_axes(cuda, shape, clip):
    """Diagonals, say; the norm is that of all their numbers."""
    momenta, deltas = sides(3, [shape, (7,)])
    old = clones(momenta)
    clips = cuda.clipped_momentum(momenta, deltas, None, 0.5, clip)
    flat = [[x.flatten(1) for x in tensors] for tensors in (momenta, deltas, old)]
    assert_momentum_is_the_reference_s(*flat, clips, 0.5, clip)


@pytest.mark.parametrize("clip", CLIPS)
def test_a_block_of_many_shares_is_summed_up_whole(cuda, clip, monkeypatch):
    momenta, deltas = sides(2, [(320, 320), (24, 24)])
    expected = eager.clipped_momentum(clones(momenta), clones(deltas), None, 0.5, clip)
    for most, least in ((512, 4096), (512, 1), (3, 1)):
        monkeypatch.setattr(cuda, "max_shares", most)
        monkeypatch.setattr(cuda, "min_share", least)
        actual = cuda.clipped_momentum(clones(momenta), deltas, None, 0.5, clip)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_bf16_momentum_is_rounded_to_nearest_with_ties_to_even(cuda):
    pattern = torch.arange(-40000, 40000, 7, dtype=torch.int32) * 4099
    value = pattern.view(FP32)
    value = torch.where(value.abs() < 1e15, value, 1.0)
    deltas = [torch.cat([value, (pattern << 16 | 0x8000).view(FP32).nan_to_num().clamp(-1e15, 1e15)])[None]]
    momenta = [torch.zeros_like(deltas[0], dtype=BF16)]
    cuda.clipped_momentum(momenta, deltas, None, 0.0, "none")
    assert torch.equal(momenta[0], deltas[0].bfloat16())


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 1e38])
@pytest.mark.parametrize("place", [(0, 0), (66, 66), (40, 5)], ids=str)
def test_a_block_that_is_not_finite_stays_on_every_side(cuda, clip, bad, place):
    """1e38 is finite; its square is not, nor is the sum of a row of it."""
    momenta, deltas = sides(3, [(2, 2), (67, 67)], BF16)
    if bad == 1e38 and clip == "row_sum":
        deltas[1][1, place[0]] = bad
    deltas[1][1][place] = bad
    before = clones(momenta)
    clips = cuda.clipped_momentum(momenta, deltas, None, 0.5, clip)
    for m, old, factors in zip(momenta, before, clips, strict=True):
        assert torch.equal(m[1], old[1]) and not torch.equal(m[0], old[0]) and not torch.equal(m[2], old[2])
        assert factors[1] == 0 and (factors[[0, 2]] > 0).all()


def test_found_inf_skips_every_block(cuda):
    for found_inf in (1.0, torch.nan):
        momenta, deltas = sides(2, [(5, 5), (3, 3)])
        before = clones(momenta)
        assert not cuda.clipped_momentum(momenta, deltas, torch.tensor([found_inf]), 0.5, "frobenius").any()
        assert all(map(torch.equal, momenta, before))
    assert cuda.clipped_momentum(momenta, deltas, torch.tensor(0.0), 0.5, "frobenius").all()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("shape", "launches"), [((0, 5, 5), 0), ((2, 0, 0), 2)], ids=str)
def test_nothing_has_no_norm(cuda, shape, launches, clip):
    before, empty = cuda.num_launches, torch.empty(shape)
    assert torch.equal(cuda.clipped_momentum([empty], [empty.clone()], None, 0.5, clip), torch.ones((1, shape[0])))
    assert cuda.num_launches == before + launches


@pytest.mark.parametrize("clip", CLIPS)
def test_sums_are_the_same_to_the_bit_in_any_order_of_threads_and_programs(cuda, clip):
    momenta, deltas = sides(2, [(130, 130), (67, 67)], BF16)
    runs = []
    for backwards in (False, True):
        again = clones(momenta)
        cuda.run_backwards(backwards)
        runs.append([cuda.clipped_momentum(again, deltas, None, 0.5, clip), *again])
    cuda.run_backwards(False)
    assert all(map(torch.equal, *runs))
