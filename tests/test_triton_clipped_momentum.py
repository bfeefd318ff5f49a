"""The normalised momentum in Triton: against the FP64 reference, and what it does about blocks that are not finite."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton_device import DEVICE, kernel_test, needs_gpu

from rootfree_kernels.eager import clipped_momentum as eager_clipped_momentum
from rootfree_kernels.triton_kernels.clipped_momentum import MAX_SHARES, MIN_SHARE, TILE, clipped_momentum
from rootfree_kernels.triton_kernels.launch import num_compilations

triton_clipped_momentum = import_module(clipped_momentum.__module__)

pytestmark = [*kernel_test, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

FP32, BF16 = torch.float32, torch.bfloat16
CLIPS = ["frobenius", "row_sum", "none"]
TOLERANCE = {FP32: 1e-6, BF16: 2.0**-8}  # of every number: two roundings of 6e-8, and one of half a unit


def drawn(shape, seed, scale=1.0, dtype=FP32, offset=0):
    """Random numbers on the device, which begin `offset` numbers behind an address of 16 bytes."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    memory = torch.empty(x.numel() + 16, dtype=dtype, device=DEVICE)
    return memory[offset : offset + x.numel()].view(shape).copy_(x)


def sides(num_blocks, shapes, dtype=FP32, scale=1.0, offset=0):
    """(momenta, deltas) with blocks of these shapes."""
    full = [(num_blocks, *shape) for shape in shapes]
    momenta = [drawn(shape, 1 + i, scale, dtype, offset) for i, shape in enumerate(full)]
    return momenta, [drawn(shape, 100 + i, scale, FP32, offset) for i, shape in enumerate(full)]


def copies(*lists):
    return [[x.clone() for x in tensors] for tensors in lists]


def numpy(x):
    return x.double().cpu().numpy()


# ---- the formula -------------------------------------------------------------------------------------------------

SIZES = st.lists(st.sampled_from([1, 2, 13, 64, 67, 130]), min_size=1, max_size=3)


@given(
    st.integers(1, 2),
    SIZES,
    st.sampled_from([FP32, BF16]),
    st.sampled_from(CLIPS),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.sampled_from([1e-3, 0.1, 10.0]),
    st.sampled_from([0, 1, 8]),
)
@example(2, [96, 13], FP32, "row_sum", 0.5, 1.0, 0)
@settings(max_examples=15, deadline=None)
def test_momentum_and_clip_are_the_reference_s(num_blocks, sizes, dtype, clip, alpha, scale, offset):
    momenta, deltas = sides(num_blocks, [(n, n) for n in sizes], dtype, scale, offset)
    expected = [alpha * numpy(m) + (1 - alpha) * numpy(delta) for m, delta in zip(momenta, deltas, strict=True)]
    factors = clipped_momentum(momenta, deltas, None, alpha, clip)
    assert factors.dtype == FP32 and factors.shape == (len(sizes), num_blocks)
    for m, value, clips in zip(momenta, expected, factors, strict=True):
        np.testing.assert_allclose(numpy(m), value, rtol=TOLERANCE[dtype], atol=1e-6 * scale)
        wanted = [ref.clipped_beta2(block, 1.0, None if clip == "none" else clip) for block in value]
        np.testing.assert_allclose(numpy(clips), wanted, rtol=1e-5)


@pytest.mark.parametrize("clip", ["frobenius", "none"])
@pytest.mark.parametrize("shape", [(1,), (17,), (3 * TILE + 5,), (2, 3, 5)], ids=str)
def test_blocks_may_have_any_number_of_axes(shape, clip):
    """Diagonals, say; the norm is that of all their numbers."""
    momenta, deltas = sides(3, [shape, (7,)])
    expected = [(numpy(m) / 2 + numpy(delta) / 2).reshape(3, 1, -1) for m, delta in zip(momenta, deltas, strict=True)]
    factors = clipped_momentum(momenta, deltas, None, 0.5, clip)
    for m, value, clips in zip(momenta, expected, factors, strict=True):
        np.testing.assert_allclose(numpy(m).reshape(3, 1, -1), value, rtol=1e-6, atol=1e-6)
        wanted = [ref.clipped_beta2(block, 1.0, None if clip == "none" else clip) for block in value]
        np.testing.assert_allclose(numpy(clips), wanted, rtol=1e-5)


@pytest.mark.parametrize("clip", CLIPS)
def test_a_block_of_many_shares_is_summed_up_whole(clip, monkeypatch):
    """Also where the number of shares is at its limit, so that they grow."""
    momenta, deltas = sides(2, [(160, 160), (24, 24)])
    expected = eager_clipped_momentum(*copies(momenta, deltas), None, 0.5, clip)
    for limit, least in ((MAX_SHARES, MIN_SHARE), (MAX_SHARES, 1), (3, 1)):
        monkeypatch.setattr(triton_clipped_momentum, "MAX_SHARES", limit)
        monkeypatch.setattr(triton_clipped_momentum, "MIN_SHARE", least)
        actual = clipped_momentum(*copies(momenta, deltas), None, 0.5, clip)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_bf16_is_rounded_to_nearest_with_ties_to_even():
    pattern = torch.arange(-40000, 40000, 7, dtype=torch.int32).to(DEVICE) * 4099
    value = pattern.view(FP32)
    value = torch.where(value.abs() < 1e15, value, 1.0)
    deltas = [torch.cat([value, (pattern << 16 | 0x8000).view(FP32).nan_to_num().clamp(-1e15, 1e15)])[None]]
    momenta = [torch.full_like(deltas[0], torch.nan, dtype=BF16).zero_()]
    clipped_momentum(momenta, deltas, None, 0.0, "none")
    assert torch.equal(momenta[0], deltas[0].bfloat16())


# ---- blocks that are left out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 1e38])
@pytest.mark.parametrize("place", [(0, 0), (66, 66), (40, 5)], ids=str)
def test_a_block_that_is_not_finite_stays_on_every_side(clip, bad, place):
    """1e38 is finite; its square is not, nor is the sum of a row of it."""
    momenta, deltas = sides(3, [(2, 2), (67, 67)], BF16)
    if bad == 1e38 and clip == "row_sum":
        deltas[1][1, place[0]] = bad
    deltas[1][1][place] = bad
    before = copies(momenta)[0]
    factors = clipped_momentum(momenta, deltas, None, 0.5, clip)
    for m, old, clips in zip(momenta, before, factors, strict=True):
        assert torch.equal(m[1], old[1]) and not torch.equal(m[0], old[0]) and not torch.equal(m[2], old[2])
        assert clips[1] == 0 and (clips[[0, 2]] > 0).all()


def test_found_inf_skips_every_block():
    for found_inf in (1.0, torch.nan):
        momenta, deltas = sides(2, [(5, 5), (3, 3)])
        before = copies(momenta)[0]
        factors = clipped_momentum(momenta, deltas, torch.tensor([found_inf], device=DEVICE), 0.5, "frobenius")
        assert all(map(torch.equal, momenta, before)) and not factors.any()
    assert clipped_momentum(momenta, deltas, torch.tensor(0.0, device=DEVICE), 0.5, "frobenius").all()


# ---- arguments ---------------------------------------------------------------------------------------------------


def test_sides_of_several_dtypes_and_any_strides_are_served():
    momenta, deltas = sides(2, [(9, 9), (30, 30)])
    expected = copies(momenta, deltas)
    factors = clipped_momentum(*expected, None, 0.5, "frobenius")
    strided = [m.mT.contiguous().mT for m in momenta], [torch.stack([x, x], -1)[..., 0] for x in deltas]
    strided[0][1] = strided[0][1].bfloat16()
    expected[0][1] = momenta[1].bfloat16()
    clipped_momentum([expected[0][1]], [deltas[1]], None, 0.5, "frobenius")
    actual = clipped_momentum(*strided, None, 0.5, "frobenius")
    assert all(map(torch.equal, strided[0], expected[0]))
    torch.testing.assert_close(actual, factors, rtol=1e-2, atol=0)


def test_a_call_is_two_launches_whatever_the_sides(monkeypatch):
    launches = []
    monkeypatch.setattr(triton_clipped_momentum, "launch", lambda *args: launches.append(args[1]))
    momenta, deltas = sides(3, [(3, 3), (130, 130), (1, 1)])
    clipped_momentum(momenta, deltas, None, 0.5, "frobenius")
    assert launches == [3 + 3 * 5 + 3] * 2


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("clip", CLIPS)
def test_nothing_has_no_norm(shape, clip):
    empty = torch.empty(shape, device=DEVICE)
    factors = clipped_momentum([empty], [empty.clone()], None, 0.5, clip)
    assert torch.equal(factors, torch.ones((1, shape[0]), device=DEVICE))


def test_changing_numbers_never_compile_anything():
    def run(num_blocks, shapes, alpha, found_inf=None):
        clipped_momentum(*sides(num_blocks, shapes), found_inf, alpha, "frobenius")

    run(3, [(5, 5), (7, 7)], 0.5)
    before = num_compilations()
    run(1, [(1, 1)], 0)
    run(16, [(16, 16)] * 3, 0.9, torch.tensor(0.0, device=DEVICE))
    assert num_compilations() == before


@pytest.mark.parametrize("clip", CLIPS)
def test_the_same_call_gives_the_same_bits(clip):
    momenta, deltas = sides(2, [(130, 130), (67, 67)], BF16)
    runs = []
    for _ in range(2):
        again = copies(momenta, deltas)
        runs.append([clipped_momentum(*again, None, 0.5, clip), *again[0]])
    assert all(map(torch.equal, *runs))


def test_what_changes_says_so_to_autograd():
    momenta, deltas = sides(2, [(3, 3), (5, 5)])
    before = [m._version for m in momenta]
    clipped_momentum(momenta, deltas, None, 0.5, "frobenius")
    assert all(m._version > old for m, old in zip(momenta, before, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_batch_of_more_than_2_31_numbers():
    num_blocks, n = 2**31 // 4096**2 + 1, 4096
    momenta = [torch.zeros((num_blocks, n, n), dtype=BF16, device=DEVICE)]
    deltas = [torch.zeros((num_blocks, n, n), device=DEVICE)]
    deltas[0][-1].copy_(torch.eye(n))
    factors = clipped_momentum(momenta, deltas, None, 0.5, "frobenius")
    assert torch.equal(momenta[0][-1], torch.eye(n, device=DEVICE).bfloat16() / 2) and not momenta[0][:-1].any()
    torch.testing.assert_close(factors[0, -1].item(), 1 / 32, rtol=1e-5, atol=0)
    assert (factors[0, :-1] == 1).all()
