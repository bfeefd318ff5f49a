"""The normalised momentum: its value, its clips, and what it does about blocks that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
import torch

from rootfree_kernels import ops


def symmetric(num_blocks, size, seed, scale=1.0):
    x = torch.randn(num_blocks, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x + x.mT) * scale


@pytest.mark.parametrize("clip", ["frobenius", "row_sum", "none"])
@pytest.mark.parametrize("scale", [0.01, 10.0], ids=["inside", "clipped"])
def test_momentum_and_clip_are_the_reference_s(clip, scale):
    sides = [(symmetric(3, size, 1, scale), symmetric(3, size, 2, scale)) for size in (6, 4)]
    expected = [(0.3 * m + 0.7 * delta).numpy() for m, delta in sides]
    momenta, deltas = [m.clone() for m, _ in sides], [delta for _, delta in sides]
    clips = ops.clipped_momentum(momenta, deltas, None, 0.3, clip, "eager")
    for m, value, factors in zip(momenta, expected, clips, strict=True):
        np.testing.assert_allclose(m.numpy(), value, rtol=1e-13, atol=1e-15)
        wanted = [ref.clipped_beta2(block, 1.0, None if clip == "none" else clip) for block in value]
        np.testing.assert_allclose(factors.numpy(), wanted, rtol=1e-13)


def test_the_row_sum_bounds_the_largest_singular_value_and_lies_below_frobenius_times_root_n():
    m = symmetric(20, 30, 3)
    _, *norms = (
        ops.clipped_momentum([m.clone()], [m.clone()], None, 0.0, clip, "eager")[0]
        for clip in ("none", "row_sum", "frobenius")
    )
    row_sum, frobenius = (1 / x for x in norms)
    spectral = torch.linalg.matrix_norm(m, 2)
    assert (row_sum >= spectral).all() and (frobenius >= spectral).all()
    assert (row_sum <= frobenius * 30**0.5).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_a_block_that_is_not_finite_stays_on_every_side(bad):
    momenta = [symmetric(3, 5, 4), symmetric(3, 2, 5)]
    deltas = [symmetric(3, 5, 6), symmetric(3, 2, 7)]
    deltas[1][1, 0, 0] = bad  # 1e300 is finite, its square is not
    before = [m.clone() for m in momenta]
    clips = ops.clipped_momentum(momenta, deltas, None, 0.5, "frobenius", "eager")
    for m, old, factors in zip(momenta, before, clips, strict=True):
        assert torch.equal(m[1], old[1]) and not torch.equal(m[0], old[0]) and not torch.equal(m[2], old[2])
        assert factors[1] == 0 and (factors[[0, 2]] > 0).all()


def test_found_inf_skips_every_block():
    m = symmetric(2, 3, 8)
    before = m.clone()
    ((factors,)) = ops.clipped_momentum([m], [symmetric(2, 3, 9)], torch.tensor([1.0]), 0.5, "frobenius", "eager")
    assert torch.equal(m, before) and torch.equal(factors, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("clip", ["frobenius", "none"])
def test_blocks_of_any_number_of_axes_are_those_laid_flat(clip):
    sides = [(symmetric(3, 6, 10), symmetric(3, 6, 11)), (symmetric(3, 4, 12, 0.01), symmetric(3, 4, 13, 0.01))]
    shapes = [(3, 36), (3, 2, 2, 4)]
    sides[1][1][0, 1, 1] = torch.nan
    momenta, deltas = ([x.clone() for x in xs] for xs in zip(*sides, strict=True))
    shaped_momenta = [m.clone().view(shape) for m, shape in zip(momenta, shapes, strict=True)]
    shaped_deltas = [delta.clone().view(shape) for delta, shape in zip(deltas, shapes, strict=True)]
    expected = ops.clipped_momentum(momenta, deltas, None, 0.3, clip, "eager")
    actual = ops.clipped_momentum(shaped_momenta, shaped_deltas, None, 0.3, clip, "eager")
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    assert actual[:, 0].eq(0).all() and actual[:, 1].gt(0).all()
    for m, flat in zip(momenta, shaped_momenta, strict=True):
        assert torch.equal(flat.view(m.shape), m)
