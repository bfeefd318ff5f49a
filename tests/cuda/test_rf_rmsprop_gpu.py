"""The CUDA kernel of the diagonal step on a GPU: comparison with the reference and eager PyTorch, and CUDA graphs."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.calls.operators import through
from tests.calls.rf_rmsprop import Call as cuda_call
from tests.calls.rf_rmsprop import assert_equal, assert_matches_reference, copied, counts, fp32_step
from tests.calls.tensors import BF16, FP16, FP32, ROUNDINGS
from tests.cuda.on_cpu.library import CHUNK

pytestmark = pytest.mark.gpu
LAYOUTS = ("whole", "offset by 1")
SIZES = [1, 13, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 768 * 768 + 3, *range(1, 300)]
"""Sizes of about 300 tensors, most of them small."""

DTYPES = [
    *product([FP32], [FP32, BF16], [FP32, BF16], [FP32]),
    *product([BF16], [BF16, FP32], [FP32, BF16], [BF16]),
    *product([FP16], [FP16, FP32], [FP32], [FP32]),
]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(x).removeprefix("torch.") for x in dtypes))
def test_step_of_hundreds_of_tensors_matches_the_reference(on_gpu, dtypes, rounding):
    layouts, kinds = ("whole", "whole", "offset by 1", "offset by 8"), (*dtypes, rounding, rounding)
    call = cuda_call(SIZES, layouts, *kinds, device="cuda", grad_scale=3.0)
    lists = call.tensors()[0]
    before = copied(lists)
    call.run(lists, on_gpu)
    assert_matches_reference(call, lists, before)
    assert counts(lists) == counts(before)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(x).removeprefix("torch.") for x in dtypes))
def test_fp32_arithmetic_is_bitwise_correct(on_gpu, dtypes, rounding):
    """nvcc -fmad=false fuses no operations, so results depend neither on alignment nor on the device."""
    kinds = (*dtypes, rounding, rounding)
    call = cuda_call([5 * CHUNK + 9, 70], LAYOUTS, *kinds, device="cuda", grad_scale=3.0)
    lists, expected = call.tensors()[0], call.tensors()[0]
    for x in (lists, expected):
        x["grad"][0][7] = torch.inf
    call.run(lists, on_gpu)
    assert_equal(lists, fp32_step(call, expected))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bf16_is_rounded_bitwise_as_in_eager_pytorch(on_gpu, rounding):
    kinds = (BF16, BF16, BF16, BF16, rounding, rounding)
    call = cuda_call(SIZES, LAYOUTS, *kinds, steps=70000, device="cuda", exact=True)
    assert_equal(call.run(run=on_gpu), call.run(run=through("eager")))


def test_elements_that_are_not_finite_are_skipped_and_counted_once(on_gpu):
    call = cuda_call([40, 300 * CHUNK + 7, 9], device="cuda")
    lists, before, expected = call.tensors()[0], call.tensors()[0], call.run(run=on_gpu)
    places = torch.arange(3, 300 * CHUNK, CHUNK + 1, device="cuda")  # in nearly every program
    lists["grad"][1][places] = torch.nan
    for count in (2, 3):
        call.run(lists, on_gpu)
        assert counts(lists) == [0, count, 2]  # they started at 0, 1, 2
        for name in ("param", "square", "buffer"):
            assert torch.equal(lists[name][1][places], before[name][1][places])
        if count == 2:
            assert torch.equal(lists["param"][0], expected["param"][0])


def test_a_step_never_waits_for_the_gpu_and_is_reproducible(on_gpu):
    call = cuda_call(SIZES, LAYOUTS, BF16, BF16, BF16, BF16, "stochastic", "stochastic", device="cuda")
    runs = [call.tensors()[0] for _ in range(2)]
    arguments = [call.arguments(lists) for lists in runs]
    for each in arguments:
        on_gpu("rf_rmsprop", *each)  # creates the tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in arguments:
            on_gpu("rf_rmsprop", *each)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(*runs)


def test_a_cuda_graph_steps_as_often_as_it_is_replayed(on_gpu):
    call = cuda_call([17 * 130, 4 * CHUNK + 1, 1], device="cuda", lr=torch.tensor(0.05, device="cuda"))
    lists, expected, start = (call.tensors()[0] for _ in range(3))
    for tensors in (lists, expected):
        tensors["grad"][1][0] = torch.nan
    arguments = call.arguments(lists)
    call.run(lists, on_gpu)  # creates the tables
    for name in ("param", "square", "buffer", "skipped"):
        torch._foreach_copy_(lists[name], start[name])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        on_gpu("rf_rmsprop", *arguments)
    for _ in range(4):
        graph.replay()
        call.run(expected, on_gpu)
    assert_equal({**lists, "grad": []}, {**expected, "grad": []})
    assert counts(lists) == [0, 5, 2]


def test_a_learning_rate_that_changes_on_the_device_is_read_at_every_step(on_gpu):
    lr = torch.zeros((), device="cuda")
    call = cuda_call([CHUNK + 5], device="cuda", lr=lr)
    lists = call.tensors()[0]
    weight = lists["param"][0].clone()
    call.run(lists, on_gpu)
    assert torch.equal(lists["param"][0], weight)
    lr.fill_(0.05)
    call.run(lists, on_gpu)
    assert (lists["param"][0] != weight).all()


def test_a_tensor_of_more_than_2_31_elements(on_gpu):
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    size, end = 2**31 + CHUNK + 3, slice(2**31 - 5, None)
    small = cuda_call([CHUNK + 8], LAYOUTS[:1], BF16, BF16, BF16, BF16, device="cuda", exact=True)
    lists, expected = small.tensors()[0], small.run(run=through("eager"))
    large = {name: list(tensors) for name, tensors in lists.items()}
    for name in ("param", "square", "buffer", "grad"):
        large[name] = [torch.ones(size, dtype=BF16, device="cuda")]
        large[name][0][end] = lists[name][0]
    replace(small, shapes=[size]).run(large, on_gpu)
    for name in ("param", "square", "buffer"):
        assert torch.equal(large[name][0][end], expected[name][0])
        assert (large[name][0][: 2**31 - 5] == large[name][0][0]).all()
