"""Splitting parameters into blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rootfree_kernels.blocks import block_views, matrix_shape, matrix_view, split_side, tiles
from tests.calls import reference as ref


@given(st.integers(1, 5000), st.integers(1, 1500))
def test_side_lengths_match_the_reference(size, max_dim):
    runs = split_side(size, max_dim)
    starts = [(run.start + i * run.size, run.size) for run in runs for i in range(run.num_blocks)]
    blocks = [slice(start, start + length) for start, length in starts]
    assert blocks == ref.block_slices(size, max_dim)
    assert len(runs) <= 2


@given(st.integers(1, 200_000), st.integers(1, 2048))
def test_blocks_cover_a_side_and_have_similar_sizes(size, max_dim):
    runs = split_side(size, max_dim)
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])] and runs[-1].stop == size
    sizes = [run.size for run in runs]
    assert max(sizes) <= max_dim
    assert 2 * min(sizes) >= max(sizes) - 1  # for example, 3 with max_dim 2 gives 2 and 1


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (2304, [(3, 768)]),
        (3072, [(3, 1024)]),
        (4096, [(4, 1024)]),
        (50257, [(49, 1008), (1, 865)]),
        (30522, [(29, 1024), (1, 826)]),
        (151936, [(150, 1008), (1, 736)]),
    ],
    ids=str,
)
def test_sides_of_real_models_are_cut_at_multiples_of_16(size, sizes):
    assert [(run.num_blocks, run.size) for run in split_side(size, 1024)] == sizes


def test_max_dim_none_does_not_cut():
    assert split_side(10**6, None) == [(0, 1, 10**6)]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), None),
        ((3,), None),
        ((1, 5), None),
        ((5, 1), None),
        ((4, 3), (4, 3)),
        ((8, 3, 3, 3), (8, 27)),
        ((8, 1, 3), (8, 3)),
    ],
    ids=str,
)
def test_shapes_that_become_matrices(shape, expected):
    assert matrix_shape(shape) == expected


@given(st.integers(2, 23), st.integers(2, 23), st.integers(1, 9))
def test_the_blocks_of_all_tiles_are_views_that_cover_the_matrix_once(rows, cols, max_dim):
    matrix = torch.zeros(rows, cols).t().contiguous().t()  # column-major, to test other strides
    for tile in tiles(matrix.shape, max_dim):
        views = block_views(matrix, tile)
        assert len(views) == tile.num_blocks
        for view in views:
            assert tuple(view.shape) == tile.block_shape
            view += 1
    assert (matrix == 1).all()


def test_blocks_are_in_row_major_order():
    matrix = torch.arange(24.0).reshape(4, 6)
    (tile,) = tiles(matrix.shape, 3)
    assert [view[0, 0].item() for view in block_views(matrix, tile)] == [0, 3, 12, 15]


def test_a_matrix_view_of_a_contiguous_weight_shares_its_memory():
    weight = torch.randn(4, 3, 2, 2)
    assert matrix_view(weight).data_ptr() == weight.data_ptr()
    channels_last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(matrix_view(channels_last), weight.reshape(4, 12))
