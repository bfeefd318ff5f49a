"""CUDA kernels of the clipped momentum on the CPU: comparison with the FP64 reference, and skipped blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.calls.clipped_momentum import assert_matches_reference, assert_memory_around_sides_is_untouched, sides
from tests.calls.operators import call
from tests.calls.tensors import BF16, CLIPS, FP32, clones
from tests.calls.tolerances import one_step
from tests.cuda.on_cpu.library import CHUNK


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
def test_momentum_and_clip_match_the_reference(cuda, num_blocks, sizes, dtype, clip, alpha, scale, offsets):
    momenta, deltas = sides(num_blocks, [(n, n) for n in sizes], dtype, scale, offsets)
    old, given_deltas = clones(momenta), clones(deltas)
    clips = cuda.clipped_momentum(momenta, deltas, None, alpha, clip)
    assert_matches_reference(momenta, deltas, old, clips, alpha, clip)
    assert all(map(torch.equal, deltas, given_deltas))
    assert_memory_around_sides_is_untouched(momenta, deltas)


@pytest.mark.parametrize("clip", ["frobenius", "none"])
@pytest.mark.parametrize("shape", [(1,), (17,), (3 * CHUNK + 5,), (2, 3, 5)], ids=str)
def test_blocks_may_have_any_number_of_axes(cuda, shape, clip):
    """A diagonal, for example, has one axis. The norm includes all elements."""
    momenta, deltas = sides(3, [shape, (7,)])
    old = clones(momenta)
    clips = cuda.clipped_momentum(momenta, deltas, None, 0.5, clip)
    flat = [[x.flatten(1) for x in tensors] for tensors in (momenta, deltas, old)]
    assert_matches_reference(*flat, clips, 0.5, clip)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_norm_of_a_large_block_includes_all_partial_sums(cuda, clip, monkeypatch):
    momenta, deltas = sides(2, [(320, 320), (24, 24)])
    expected = call("eager", "clipped_momentum", clones(momenta), clones(deltas), None, 0.5, clip)
    for most, least in ((512, 4096), (512, 1), (3, 1)):
        monkeypatch.setattr(cuda, "max_shares", most)
        monkeypatch.setattr(cuda, "min_share", least)
        actual = cuda.clipped_momentum(clones(momenta), deltas, None, 0.5, clip)
        torch.testing.assert_close(actual, expected, rtol=one_step(FP32), atol=0)


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
def test_a_block_that_is_not_finite_keeps_all_momenta(cuda, clip, bad, place):
    """1e38 is finite, but its square and the sum of a row with it are not."""
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
def test_empty_blocks_have_no_norm(cuda, shape, launches, clip):
    before, empty = cuda.num_launches, torch.empty(shape)
    assert torch.equal(cuda.clipped_momentum([empty], [empty.clone()], None, 0.5, clip), torch.ones((1, shape[0])))
    assert cuda.num_launches == before + launches


@pytest.mark.parametrize("clip", CLIPS)
def test_sums_do_not_depend_on_the_order_of_threads_and_programs(cuda, clip):
    momenta, deltas = sides(2, [(130, 130), (67, 67)], BF16)
    runs = []
    for backwards in (False, True):
        again = clones(momenta)
        cuda.run_backwards(backwards)
        runs.append([cuda.clipped_momentum(again, deltas, None, 0.5, clip), *again])
    cuda.run_backwards(False)
    assert all(map(torch.equal, *runs))
