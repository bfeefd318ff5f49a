"""How a parameter is cut into blocks: matrix view → runs of equal blocks along each side → tiles.

A weight with two or more axes is viewed as a matrix [shape[0], rest]. A side longer than `max_dim` is cut into blocks
of at most two sizes. Blocks of one size are neighbours, so a matrix consists of at most four *tiles*: rectangles of
equal blocks. A tile is one strided view of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor


class BlockRun(NamedTuple):
    """`num_blocks` neighbouring blocks of `size` rows (or columns), the first at `start`."""

    start: int
    num_blocks: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.num_blocks * self.size


class Tile(NamedTuple):
    """A rectangle of equal blocks of one matrix."""

    rows: BlockRun
    cols: BlockRun

    @classmethod
    def single(cls, rows: int, cols: int) -> Tile:
        """Return a tile of one block that is the whole matrix."""
        return cls(BlockRun(0, 1, rows), BlockRun(0, 1, cols))

    @property
    def num_blocks(self) -> int:
        return self.rows.num_blocks * self.cols.num_blocks

    @property
    def block_shape(self) -> tuple[int, int]:
        return self.rows.size, self.cols.size

    @property
    def as_ints(self) -> tuple[int, int, int, int]:
        """First row, blocks down, first column, blocks across: how operators are told of a tile."""
        return self.rows.start, self.rows.num_blocks, self.cols.start, self.cols.num_blocks


ALIGNED = 16
"""Long sides are cut at multiples of this, 32 bytes of BF16, because kernels read memory 16 bytes at a time."""

LONG = 128
"""The smallest `max_dim` for which sides are cut at multiples of ALIGNED."""


def split_side(size: int, max_dim: int | None) -> list[BlockRun]:
    """Return the runs of a side of `size`, cut into blocks of at most `max_dim`. None leaves the side whole.

    If `max_dim` is 128 or more, the blocks are multiples of 16: as few equal ones as possible, or else the longest ones
    that leave a last block of at least half their size. If that is impossible, or `max_dim` is smaller, there are
    ceil(size / max_dim) blocks whose sizes differ by at most one, the larger ones first.
    """
    if max_dim is None or size <= max_dim:
        return [BlockRun(0, 1, size)]
    num_blocks = -(-size // max_dim)
    if max_dim >= LONG and size % (num_blocks * ALIGNED):
        for block in range(max_dim - max_dim % ALIGNED, max_dim // 2, -ALIGNED):
            count, last = divmod(size, block)
            if last == 0:
                return [BlockRun(0, count, block)]
            if 2 * last >= block:
                return [BlockRun(0, count, block), BlockRun(count * block, 1, last)]
    small, num_large = divmod(size, num_blocks)
    large = BlockRun(0, num_large, small + 1)
    rest = BlockRun(large.stop, num_blocks - num_large, small)
    return [run for run in (large, rest) if run.num_blocks]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """Return (rows, columns) of a weight viewed as a matrix, or None if it has no two sides longer than 1."""
    if len(shape) < 2:
        return None
    rows, cols = shape[0], prod(shape[1:])
    return (rows, cols) if rows > 1 and cols > 1 else None


def tiles(shape: Sequence[int], max_dim: int | None) -> list[Tile]:
    """Return the tiles of a weight. There are none if it takes the diagonal step."""
    matrix = matrix_shape(shape)
    if matrix is None:
        return []
    rows, cols = (split_side(side, max_dim) for side in matrix)
    return [Tile(row_run, col_run) for row_run in rows for col_run in cols]


def matrix_view(tensor: Tensor) -> Tensor:
    """Return `tensor` as [shape[0], rest]: a view if its strides allow that, else a contiguous copy."""
    return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[0], -1)


def matrix_views(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return `matrix_view` of every tensor, or the list itself if all of them have two axes."""
    return tensors if set(map(Tensor.dim, tensors)) == {2} else [matrix_view(tensor) for tensor in tensors]


def block_views(matrix: Tensor, tile: Tile) -> list[Tensor]:
    """Return the blocks of a tile, row by row, each a strided view [block rows, block columns] of `matrix`."""
    if tile.num_blocks == 1 and tile.block_shape == tuple(matrix.shape):
        return [matrix]
    (row_start, num_rows, rows), (col_start, num_cols, cols) = tile
    part = matrix[row_start : tile.rows.stop, col_start : tile.cols.stop]
    grid = part.unflatten(0, (num_rows, rows)).unflatten(2, (num_cols, cols)).transpose(1, 2)
    return [block for row in grid.unbind(0) for block in row.unbind(0)]


def tiles_from_ints(ints: Sequence[int], rows: int, cols: int) -> list[Tile]:
    """Return tiles of blocks of rows × cols from their `Tile.as_ints`, one after the other."""
    quadruples = zip(*(iter(ints),) * 4, strict=True)
    return [Tile(BlockRun(row, down, rows), BlockRun(col, across, cols)) for row, down, col, across in quadruples]


def tiled_blocks(lists: Sequence[Sequence[Tensor]], ints: Sequence[int], rows: int, cols: int) -> list[list[Tensor]]:
    """Return `blocks_of` for every list of tensors, from the `Tile.as_ints` of their tiles. Empty lists stay empty."""
    tiles = tiles_from_ints(ints, rows, cols)
    return [blocks_of(tensors, tiles) if tensors else [] for tensors in lists]


def blocks_of(tensors: Sequence[Tensor], tiles: Sequence[Tile]) -> list[Tensor]:
    """Return the block views [p, d] of one tile of each tensor, tile by tile and each tile row by row."""
    return [
        block for tensor, tile in zip(tensors, tiles, strict=True) for block in block_views(matrix_view(tensor), tile)
    ]
