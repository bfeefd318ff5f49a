"""Clipped momentum in Triton: comparison with the FP64 reference, and blocks that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.calls.clipped_momentum import (
    Sides,
    assert_matches_reference,
    assert_memory_around_sides_is_untouched,
    sides,
)
from tests.calls.device import DEVICE, kernel_test, launches, module_of, needs_gpu
from tests.calls.operators import call
from tests.calls.tensors import BF16, CLIPS, FP32, clones
from tests.calls.tolerances import one_step

pytestmark = kernel_test

TILE, MAX_SHARES, MIN_SHARE = (
    getattr(module_of("clipped_momentum"), name) for name in ("TILE", "MAX_SHARES", "MIN_SHARE")
)


def triton_sides(*args: Any, **rest: Any) -> tuple[Sides, Sides]:
    return sides(*args, **rest, device=DEVICE)


def momentum(*args: Any) -> Tensor:
    return call("triton", "clipped_momentum", *args)


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
def test_momentum_and_clip_match_the_reference(num_blocks, sizes, dtype, clip, alpha, scale, offset):
    momenta, deltas = triton_sides(num_blocks, [(n, n) for n in sizes], dtype, scale, (offset, offset))
    old, given_deltas = clones(momenta), clones(deltas)
    clips = momentum(momenta, deltas, None, alpha, clip)
    assert clips.dtype == FP32 and clips.shape == (len(sizes), num_blocks)
    assert_matches_reference(momenta, given_deltas, old, clips, alpha, clip)
    assert_memory_around_sides_is_untouched(momenta, deltas)


@pytest.mark.parametrize("clip", ["frobenius", "none"])
@pytest.mark.parametrize("shape", [(1,), (17,), (3 * TILE + 5,), (2, 3, 5)], ids=str)
def test_blocks_may_have_any_number_of_axes(shape, clip):
    """A diagonal, for example, has one axis. The norm includes all elements."""
    momenta, deltas = triton_sides(3, [shape, (7,)])
    old, given_deltas = clones(momenta), clones(deltas)
    clips = momentum(momenta, deltas, None, 0.5, clip)
    assert_matches_reference(momenta, given_deltas, old, clips, 0.5, clip)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_norm_of_a_large_block_includes_all_partial_sums(clip, monkeypatch):
    """If the number of shares reaches its limit, shares become larger."""
    momenta, deltas = triton_sides(2, [(160, 160), (24, 24)])
    expected = call("eager", "clipped_momentum", clones(momenta), clones(deltas), None, 0.5, clip)
    for limit, least in ((MAX_SHARES, MIN_SHARE), (MAX_SHARES, 1), (3, 1)):
        monkeypatch.setattr(module_of("clipped_momentum"), "MAX_SHARES", limit)
        monkeypatch.setattr(module_of("clipped_momentum"), "MIN_SHARE", least)
        actual = momentum(clones(momenta), clones(deltas), None, 0.5, clip)
        torch.testing.assert_close(actual, expected, rtol=one_step(FP32), atol=0)


def test_bf16_is_rounded_to_nearest_with_ties_to_even():
    pattern = torch.arange(-40000, 40000, 7, dtype=torch.int32).to(DEVICE) * 4099
    value = pattern.view(FP32)
    value = torch.where(value.abs() < 1e15, value, 1.0)
    deltas = [torch.cat([value, (pattern << 16 | 0x8000).view(FP32).nan_to_num().clamp(-1e15, 1e15)])[None]]
    momenta = [torch.full_like(deltas[0], torch.nan, dtype=BF16).zero_()]
    momentum(momenta, deltas, None, 0.0, "none")
    assert torch.equal(momenta[0], deltas[0].bfloat16())


# ---- skipped blocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 1e38])
@pytest.mark.parametrize("place", [(0, 0), (66, 66), (40, 5)], ids=str)
def test_a_block_that_is_not_finite_keeps_all_momenta(clip, bad, place):
    """1e38 is finite, but its square and the sum of a row with it are not."""
    momenta, deltas = triton_sides(3, [(2, 2), (67, 67)], BF16)
    if bad == 1e38 and clip == "row_sum":
        deltas[1][1, place[0]] = bad
    deltas[1][1][place] = bad
    before = clones(momenta)
    factors = momentum(momenta, deltas, None, 0.5, clip)
    for m, old, clips in zip(momenta, before, factors, strict=True):
        assert torch.equal(m[1], old[1]) and not torch.equal(m[0], old[0]) and not torch.equal(m[2], old[2])
        assert clips[1] == 0 and (clips[[0, 2]] > 0).all()


def test_found_inf_skips_every_block():
    for found_inf in (1.0, torch.nan):
        momenta, deltas = triton_sides(2, [(5, 5), (3, 3)])
        before = clones(momenta)
        factors = momentum(momenta, deltas, torch.tensor([found_inf], device=DEVICE), 0.5, "frobenius")
        assert all(map(torch.equal, momenta, before)) and not factors.any()
    assert momentum(momenta, deltas, torch.tensor(0.0, device=DEVICE), 0.5, "frobenius").all()


# ---- arguments ---------------------------------------------------------------------------------------------------


def test_momenta_may_have_several_dtypes_and_any_strides():
    momenta, deltas = triton_sides(2, [(9, 9), (30, 30)])
    expected = clones(momenta), clones(deltas)
    factors = momentum(*expected, None, 0.5, "frobenius")
    strided = [m.mT.contiguous().mT for m in momenta], [torch.stack([x, x], -1)[..., 0] for x in deltas]
    strided[0][1] = strided[0][1].bfloat16()
    expected[0][1] = momenta[1].bfloat16()
    momentum([expected[0][1]], [deltas[1]], None, 0.5, "frobenius")
    actual = momentum(*strided, None, 0.5, "frobenius")
    assert all(map(torch.equal, strided[0], expected[0]))
    torch.testing.assert_close(actual, factors, rtol=one_step(BF16), atol=0)


def test_every_call_needs_two_launches(monkeypatch):
    launched = []
    monkeypatch.setattr(module_of("clipped_momentum"), "launch", lambda *args: launched.append(args[1]))
    momenta, deltas = triton_sides(3, [(3, 3), (130, 130), (1, 1)])
    momentum(momenta, deltas, None, 0.5, "frobenius")
    assert launched == [3 + 3 * 5 + 3] * 2


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("clip", CLIPS)
def test_empty_blocks_have_no_norm(shape, clip):
    empty = torch.empty(shape, device=DEVICE)
    factors = momentum([empty], [empty.clone()], None, 0.5, clip)
    assert torch.equal(factors, torch.ones((1, shape[0]), device=DEVICE))


def test_changed_values_do_not_recompile():
    def run(num_blocks, shapes, alpha, found_inf=None):
        momentum(*triton_sides(num_blocks, shapes), found_inf, alpha, "frobenius")

    run(3, [(5, 5), (7, 7)], 0.5)
    before = launches.num_compilations()
    run(1, [(1, 1)], 0)
    run(16, [(16, 16)] * 3, 0.9, torch.tensor(0.0, device=DEVICE))
    assert launches.num_compilations() == before


@pytest.mark.parametrize("clip", CLIPS)
def test_the_same_call_gives_the_same_bits(clip):
    momenta, deltas = triton_sides(2, [(130, 130), (67, 67)], BF16)
    runs = []
    for _ in range(2):
        again = clones(momenta)
        runs.append([momentum(again, clones(deltas), None, 0.5, clip), *again])
    assert all(map(torch.equal, *runs))


def test_changed_tensors_get_a_new_version():
    momenta, deltas = triton_sides(2, [(3, 3), (5, 5)])
    before = [m._version for m in momenta]
    momentum(momenta, deltas, None, 0.5, "frobenius")
    assert all(m._version > old for m, old in zip(momenta, before, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_batch_of_more_than_2_31_elements():
    num_blocks, n = 2**31 // 4096**2 + 1, 4096
    momenta = [torch.zeros((num_blocks, n, n), dtype=BF16, device=DEVICE)]
    deltas = [torch.zeros((num_blocks, n, n), device=DEVICE)]
    deltas[0][-1].copy_(torch.eye(n))
    factors = momentum(momenta, deltas, None, 0.5, "frobenius")
    assert torch.equal(momenta[0][-1], torch.eye(n, device=DEVICE).bfloat16() / 2) and not momenta[0][:-1].any()
    torch.testing.assert_close(factors[0, -1].item(), 1 / 32, rtol=one_step(FP32), atol=0)
    assert (factors[0, :-1] == 1).all()
