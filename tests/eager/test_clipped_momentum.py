"""Clipped momentum in eager PyTorch: momenta, clip factors, and blocks that are not finite."""

from __future__ import annotations

import pytest
import torch

from tests.calls.clipped_momentum import assert_matches_reference
from tests.calls.operators import dispatched
from tests.calls.tensors import CLIPS, FP64, clones
from tests.calls.tolerances import tolerance


def momentum(*args):
    return dispatched("eager")("clipped_momentum", *args)


def symmetric(num_blocks, size, seed, scale=1.0):
    x = torch.randn(num_blocks, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x + x.mT) * scale


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("scale", [0.01, 10.0], ids=["not clipped", "clipped"])
def test_momentum_and_clip_match_the_reference(clip, scale):
    sides = [(symmetric(3, size, 1, scale), symmetric(3, size, 2, scale)) for size in (6, 4)]
    momenta, deltas = map(list, zip(*sides, strict=True))
    old = clones(momenta)
    clips = momentum(momenta, clones(deltas), None, 0.3, clip)
    assert_matches_reference(momenta, deltas, old, clips, 0.3, clip)


def test_the_row_sum_bounds_the_largest_singular_value_and_lies_below_frobenius_times_root_n():
    m = symmetric(20, 30, 3)
    _, *norms = (momentum([m.clone()], [m.clone()], None, 0.0, clip)[0] for clip in ("none", "row_sum", "frobenius"))
    row_sum, frobenius = (1 / x for x in norms)
    spectral = torch.linalg.matrix_norm(m, 2)
    assert (row_sum >= spectral).all() and (frobenius >= spectral).all()
    assert (row_sum <= frobenius * 30**0.5).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_a_block_that_is_not_finite_keeps_all_momenta(bad):
    momenta = [symmetric(3, 5, 4), symmetric(3, 2, 5)]
    deltas = [symmetric(3, 5, 6), symmetric(3, 2, 7)]
    deltas[1][1, 0, 0] = bad  # 1e300 is finite, but its square is not
    before = [m.clone() for m in momenta]
    clips = momentum(momenta, deltas, None, 0.5, "frobenius")
    for m, old, factors in zip(momenta, before, clips, strict=True):
        assert torch.equal(m[1], old[1]) and not torch.equal(m[0], old[0]) and not torch.equal(m[2], old[2])
        assert factors[1] == 0 and (factors[[0, 2]] > 0).all()


def test_found_inf_skips_every_block():
    m = symmetric(2, 3, 8)
    before = m.clone()
    ((factors,)) = momentum([m], [symmetric(2, 3, 9)], torch.tensor([1.0]), 0.5, "frobenius")
    assert torch.equal(m, before) and torch.equal(factors, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("clip", ["frobenius", "none"])
def test_blocks_may_have_any_number_of_axes(clip):
    sides = [(symmetric(3, 6, 10), symmetric(3, 6, 11)), (symmetric(3, 4, 12, 0.01), symmetric(3, 4, 13, 0.01))]
    shapes = [(3, 36), (3, 2, 2, 4)]
    sides[1][1][0, 1, 1] = torch.nan
    momenta, deltas = ([x.clone() for x in xs] for xs in zip(*sides, strict=True))
    shaped_momenta = [m.clone().view(shape) for m, shape in zip(momenta, shapes, strict=True)]
    shaped_deltas = [delta.clone().view(shape) for delta, shape in zip(deltas, shapes, strict=True)]
    expected = momentum(momenta, deltas, None, 0.3, clip)
    actual = momentum(shaped_momenta, shaped_deltas, None, 0.3, clip)
    torch.testing.assert_close(actual, expected, rtol=tolerance("an element", FP64), atol=0)
    assert actual[:, 0].eq(0).all() and actual[:, 1].gt(0).all()
    for m, flat in zip(momenta, shaped_momenta, strict=True):
        assert torch.equal(flat.view(m.shape), m)
