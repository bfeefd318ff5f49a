"""The CUDA kernels on a GPU, as users get them: against the FP64 reference, eager PyTorch, and in CUDA graphs."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import product

import pytest
import torch
from cuda_on_cpu.calls import (
    BF16,
    FP16,
    FP32,
    Call,
    ExactCall,
    assert_equal,
    assert_is_the_reference_s,
    copied,
    counts,
    fp32_step,
)
from cuda_on_cpu.sides import assert_is_the_reference_s as assert_momentum_is_the_reference_s
from cuda_on_cpu.sides import clones, sides

from rootfree_kernels import eager

pytestmark = pytest.mark.gpu

CLIPS = ["frobenius", "row_sum", "none"]
CHUNK = 2048
SIZES = [1, 13, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 768 * 768 + 3, *range(1, 300)]
"""Some hundred tensors, tiny ones for the most part."""


@pytest.fixture(scope="module")
def cuda():
    """`rootfree_kernels.cuda_kernels`."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that PyTorch can use")
    try:
        import_module("rootfree_kernels._C")
        served = torch._C._dispatch_has_kernel_for_dispatch_key("rootfree_native::rf_rmsprop_table", "CUDA")
    except (ImportError, RuntimeError):
        served = False
    if not served:
        pytest.skip("the extension was built without its CUDA part; `python -m rootfree_kernels` says why")
    return import_module("rootfree_kernels.cuda_kernels")


# ---- the diagonal step -------------------------------------------------------------------------------------------

DTYPES = [
    *product([FP32], [FP32, BF16], [FP32, BF16], [FP32]),
    *product([BF16], [BF16, FP32], [FP32, BF16], [BF16]),
    *product([FP16], [FP16, FP32], [FP32], [FP32]),
]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(x).removeprefix("torch.") for x in dtypes))
def test_a_step_of_some_hundred_tensors_is_the_reference_s(cuda, dtypes, rounding):
    call = Call(SIZES, [0, 0, 1, 8], *dtypes, rounding, rounding, device="cuda", grad_scale=3.0)
    lists = call.tensors()[0]
    before = copied(lists)
    call.run(cuda.rf_rmsprop, lists)
    assert_is_the_reference_s(call, lists, before)
    assert counts(lists) == counts(before)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(x).removeprefix("torch.") for x in dtypes))
def test_fp32_arithmetic_is_right_to_the_bit(cuda, dtypes, rounding):
    """No operation is fused (nvcc -fmad=false): results do not hang on alignment, nor on the device."""
    call = Call([5 * CHUNK + 9, 70], [0, 1], *dtypes, rounding, rounding, device="cuda", grad_scale=3.0)
    lists, expected = call.tensors()[0], call.tensors()[0]
    for x in (lists, expected):
        x["grad"][0][7] = torch.inf
    call.run(cuda.rf_rmsprop, lists)
    assert_equal(lists, fp32_step(call, expected))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_bf16_is_rounded_as_in_eager_pytorch_to_the_bit(cuda, rounding):
    call = ExactCall(SIZES, [0, 1], BF16, BF16, BF16, BF16, rounding, rounding, steps=70000, device="cuda")
    assert_equal(call.run(cuda.rf_rmsprop), call.run(eager.rf_rmsprop))


def test_numbers_that_are_not_finite_are_left_out_and_counted_once_a_step(cuda):
    call = Call([40, 300 * CHUNK + 7, 9], device="cuda")
    lists, before, expected = call.tensors()[0], call.tensors()[0], call.run(cuda.rf_rmsprop)
    places = torch.arange(3, 300 * CHUNK, CHUNK + 1, device="cuda")  # in nearly every program
    lists["grad"][1][places] = torch.nan
    for count in (2, 3):
        call.run(cuda.rf_rmsprop, lists)
        assert counts(lists) == [0, count, 2]  # they started at 0, 1, 2
        for name in ("param", "square", "buffer"):
            assert torch.equal(lists[name][1][places], before[name][1][places])
        if count == 2:
            assert torch.equal(lists["param"][0], expected["param"][0])


def test_a_step_never_waits_for_the_gpu_and_repeats_to_the_bit(cuda):
    call = Call(SIZES, [0, 1], BF16, BF16, BF16, BF16, "stochastic", "stochastic", device="cuda")
    runs = [call.tensors()[0] for _ in range(2)]
    arguments = [call.arguments(lists) for lists in runs]
    for each in arguments:
        cuda.rf_rmsprop(*each)  # makes the tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in arguments:
            cuda.rf_rmsprop(*each)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(*runs)


def test_a_cuda_graph_steps_as_often_as_it_is_replayed(cuda):
    call = Call([17 * 130, 4 * CHUNK + 1, 1], device="cuda", lr=torch.tensor(0.05, device="cuda"))
    lists, expected, start = (call.tensors()[0] for _ in range(3))
    for tensors in (lists, expected):
        tensors["grad"][1][0] = torch.nan
    arguments = call.arguments(lists)
    call.run(cuda.rf_rmsprop, lists)  # makes the tables
    for name in ("param", "square", "buffer", "skipped"):
        torch._foreach_copy_(lists[name], start[name])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.rf_rmsprop(*arguments)
    for _ in range(4):
        graph.replay()
        call.run(cuda.rf_rmsprop, expected)
    assert_equal({**lists, "grad": []}, {**expected, "grad": []})
    assert counts(lists) == [0, 5, 2]


def test_a_learning_rate_that_changes_on_the_device_is_read_at_every_step(cuda):
    lr = torch.zeros((), device="cuda")
    call = Call([CHUNK + 5], device="cuda", lr=lr)
    lists = call.tensors()[0]
    weight = lists["param"][0].clone()
    call.run(cuda.rf_rmsprop, lists)
    assert torch.equal(lists["param"][0], weight)
    lr.fill_(0.05)
    call.run(cuda.rf_rmsprop, lists)
    assert (lists["param"][0] != weight).all()


def test_a_tensor_of_more_than_2_31_numbers(cuda):
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    size, end = 2**31 + CHUNK + 3, slice(2**31 - 5, None)
    small = ExactCall([CHUNK + 8], [0], BF16, BF16, BF16, BF16, device="cuda")
    lists, expected = small.tensors()[0], small.run(eager.rf_rmsprop)
    large = {name: list(tensors) for name, tensors in lists.items()}
    for name in ("param", "square", "buffer", "grad"):
        large[name] = [torch.ones(size, dtype=BF16, device="cuda")]
        large[name][0][end] = lists[name][0]
    replace(small, sizes=[size]).run(cuda.rf_rmsprop, large)
    for name in ("param", "square", "buffer"):
        assert torch.equal(large[name][0][end], expected[name][0])
        assert (large[name][0][: 2**31 - 5] == large[name][0][0]).all()


# ---- the momentum ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("offsets", [(0, 0), (0, 1), (1, 0)])
def test_momentum_and_clip_are_the_reference_s(cuda, clip, dtype, offsets):
    momenta, deltas = sides(5, [(300, 300), (67, 67), (1, 1), (1024, 1024)], dtype, 0.1, offsets, "cuda")
    old = clones(momenta)
    clips = cuda.clipped_momentum(momenta, clones(deltas), None, 0.3, clip)
    assert_momentum_is_the_reference_s(momenta, deltas, old, clips, 0.3, clip)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_block_that_is_not_finite_stays_on_every_side(cuda, clip, bad):
    momenta, deltas = sides(3, [(2, 2), (515, 515)], BF16, device="cuda")
    deltas[1][1, 514, 513] = bad
    before = clones(momenta)
    clips = cuda.clipped_momentum(momenta, deltas, None, 0.5, clip)
    for m, old, factors in zip(momenta, before, clips, strict=True):
        assert torch.equal(m[1], old[1]) and not torch.equal(m[0], old[0]) and not torch.equal(m[2], old[2])
        assert factors[1] == 0 and (factors[[0, 2]] > 0).all()


@pytest.mark.parametrize("clip", CLIPS)
def test_a_replayed_graph_gives_the_bits_of_a_call(cuda, clip):
    momenta, deltas = sides(4, [(130, 130), (768, 768)], BF16, device="cuda")
    start, expected = clones(momenta), clones(momenta)
    cuda.clipped_momentum(momenta, deltas, None, 0.5, clip)
    torch._foreach_copy_(momenta, start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clips = cuda.clipped_momentum(momenta, deltas, None, 0.5, clip)
    for _ in range(3):
        graph.replay()
        wanted = cuda.clipped_momentum(expected, deltas, None, 0.5, clip)
        assert torch.equal(clips, wanted) and all(map(torch.equal, momenta, expected))
