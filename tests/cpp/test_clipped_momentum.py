"""Clipped momentum in C++: comparison with the FP64 reference and eager PyTorch, and blocks that are not finite.

test_instruction_sets.py tests that results do not depend on the instruction set.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.calls.clipped_momentum import assert_matches_reference, assert_memory_around_sides_is_untouched, sides
from tests.calls.cpu import needs_cpp, threads
from tests.calls.operators import call
from tests.calls.tensors import BF16, CLIPS, FP32, clones, same_bits
from tests.calls.tolerances import one_step
from tests.cpp.calls import CHUNK, PIECE

pytestmark = needs_cpp


def momentum(*args: Any) -> Tensor:
    return call("cpp", "clipped_momentum", *args)


@given(
    st.integers(1, 3),
    st.lists(st.sampled_from([1, 2, 13, 64, 67, 130, PIECE + 9]), min_size=1, max_size=3),
    st.sampled_from([FP32, BF16]),
    st.sampled_from(CLIPS),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.sampled_from([1e-3, 0.1, 10.0]),
    st.sampled_from([(0, 0), (1, 1), (0, 3), (3, 0)]),
)
@example(2, [PIECE + 9, 130], FP32, "row_sum", 0.5, 1.0, (0, 0))
@example(2, [PIECE + 9, 130], BF16, "frobenius", 0.5, 1.0, (1, 3))
@settings(max_examples=40, deadline=None)
def test_momentum_and_clip_match_the_reference(num_blocks, sizes, dtype, clip, alpha, scale, offsets):
    momenta, deltas = sides(num_blocks, [(n, n) for n in sizes], dtype, scale, offsets)
    old, given_deltas = clones(momenta), clones(deltas)
    clips = momentum(momenta, deltas, None, alpha, clip)
    assert clips.dtype == FP32 and clips.shape == (len(sizes), num_blocks)
    assert_matches_reference(momenta, deltas, old, clips, alpha, clip)
    for m, before, delta in zip(momenta, old, given_deltas, strict=True):
        assert torch.equal(m, (before.float() * alpha + delta * (1 - torch.tensor(alpha))).to(dtype))
    wanted = call("eager", "clipped_momentum", old, given_deltas, None, alpha, clip)
    torch.testing.assert_close(clips, wanted, rtol=one_step(FP32), atol=0)
    assert_memory_around_sides_is_untouched(momenta, deltas)


@pytest.mark.parametrize("clip", ["frobenius", "none"])
@pytest.mark.parametrize("shape", [(1,), (17,), (3 * CHUNK + 5,), (2, 3, 5)], ids=str)
def test_blocks_may_have_any_number_of_axes(shape, clip):
    """A diagonal, for example, has one axis. The norm includes all elements."""
    momenta, deltas = sides(3, [shape, (7,)])
    old = clones(momenta)
    clips = momentum(momenta, deltas, None, 0.5, clip)
    flat_sides = [[x.flatten(1) for x in tensors] for tensors in (momenta, deltas, old)]
    assert_matches_reference(*flat_sides, clips, 0.5, clip)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 1e38])
@pytest.mark.parametrize("place", [(0, 0), (129, 129), (40, 5)], ids=str)
def test_a_block_that_is_not_finite_keeps_all_momenta(clip, bad, place):
    """1e38 is finite, but its square and the sum of a row with it are not."""
    for side in (0, 1):
        momenta, deltas = sides(3, [(130, 130), (130, 130)], BF16)
        if bad == 1e38 and clip == "row_sum":
            deltas[side][1, place[0]] = bad
        deltas[side][1][place] = bad
        before = clones(momenta)
        clips = momentum(momenta, deltas, None, 0.5, clip)
        for m, old, factors in zip(momenta, before, clips, strict=True):
            assert same_bits(m[1], old[1]) and not torch.equal(m[0], old[0]) and not torch.equal(m[2], old[2])
            assert factors[1] == 0 and (factors[[0, 2]] > 0).all()


def test_found_inf_skips_every_block():
    for found_inf in (1.0, torch.nan):
        momenta, deltas = sides(2, [(5, 5), (3, 3)])
        before = clones(momenta)
        assert not momentum(momenta, deltas, torch.tensor([found_inf]), 0.5, "frobenius").any()
        assert all(map(same_bits, momenta, before))
    assert momentum(momenta, deltas, torch.tensor(0.0), 0.5, "frobenius").all()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 0)], ids=str)
def test_empty_blocks_have_no_norm(shape, clip):
    empty = torch.empty(shape)
    assert torch.equal(momentum([empty], [empty.clone()], None, 0.5, clip), torch.ones((1, shape[0])))


def test_momenta_may_have_several_dtypes_and_any_strides():
    momenta, deltas = sides(2, [(9, 9), (30, 30)])
    momenta[1] = momenta[1].bfloat16()
    expected, given_deltas = clones(momenta), clones(deltas)
    strided = [m.mT.contiguous().mT for m in momenta], [torch.stack([x, x], -1)[..., 0] for x in deltas]
    clips = torch.cat([momentum([m], [x], None, 0.5, "frobenius") for m, x in zip(expected, deltas, strict=True)])
    assert same_bits(momentum(*strided, None, 0.5, "frobenius"), clips)
    assert all(map(same_bits, strided[0], expected)) and all(map(same_bits, strided[1], given_deltas))


def test_inference_tensors_can_be_updated():
    with torch.inference_mode():
        momenta, deltas = sides(2, [(5, 5)])
        momentum(momenta, deltas, None, 0.5, "frobenius")
    expected, deltas = sides(2, [(5, 5)])
    momentum(expected, deltas, None, 0.5, "frobenius")
    assert momenta[0].is_inference() and same_bits(momenta[0], expected[0])


def test_changed_momenta_get_a_new_version():
    momenta, deltas = sides(2, [(3, 3), (5, 5)])
    before = [m._version for m in momenta]
    momentum(momenta, deltas, None, 0.5, "frobenius")
    assert all(m._version > old for m, old in zip(momenta, before, strict=True))


@pytest.mark.parametrize("clip", CLIPS)
def test_result_does_not_depend_on_the_number_of_threads(clip):
    momenta, deltas = sides(3, [(200, 200), (67, 67)], BF16)
    runs = []
    for number in (1, 2, 3):
        again = clones(momenta)
        with threads(number):
            runs.append([momentum(again, deltas, None, 0.5, clip), *again])
    assert all(map(same_bits, runs[0], runs[1])) and all(map(same_bits, runs[0], runs[2]))
