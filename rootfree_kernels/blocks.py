"""From a parameter to blocks: matrix view → runs of equal blocks along each side → tiles.

A weight with two or more axes is seen as a matrix [shape[0], rest]; a side longer than `max_dim` is cut into blocks of
at most two sizes. Blocks of one size lie side by side, so that a matrix falls into at most four *tiles*, rectangles of
equal blocks, and a tile is one strided view of the weight.
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
        """One block that is the whole matrix."""
        return cls(BlockRun(0, 1, rows), BlockRun(0, 1, cols))

    @property
    def num_blocks(self) -> int:
        return self.rows.num_blocks * self.cols.num_blocks

    @property
    def block_shape(self) -> tuple[int, int]:
        return self.rows.size, self.cols.size

    @property
    def as_ints(self) -> tuple[int, int, int, int]:
        """What operators are told of a tile beside its block shape: first row, blocks down, first column, across."""
        return self.rows.start, self.rows.num_blocks, self.cols.start, self.cols.num_blocks


ALIGNED = 16
"""Long sides are cut into blocks of a multiple of this, 32 bytes of BF16: memory is read 16 bytes at a time."""

LONG = 128
"""From this `max_dim` on sides are cut at multiples of ALIGNED."""


def split_side(size: int, max_dim: int | None) -> list[BlockRun]:
    """The runs of a side of `size` cut into blocks of at most `max_dim`; `None` leaves it whole.

    Where `max_dim` is 128 or more, into equal blocks of a multiple of 16, as few as possible; or else into the longest
    such blocks that leave a last one of at least half their size. Otherwise, and where there are no such, into
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
    """(rows, columns) of a weight seen as a matrix, `None` where it has no two sides longer than 1."""
    if len(shape) < 2:
        return None
    rows, cols = shape[0], prod(shape[1:])
    return (rows, cols) if rows > 1 and cols > 1 else None


def tiles(shape: Sequence[int], max_dim: int | None) -> list[Tile]:
    """The tiles of a weight, none where it takes the diagonal step."""
    matrix = matrix_shape(shape)
    if matrix is None:
        return []
    rows, cols = (split_side(side, max_dim) for side in matrix)
    return [Tile(row_run, col_run) for row_run in rows for col_run in cols]


def matrix_view(tensor: Tensor) -> Tensor:
    """`tensor` as [shape[0], rest]: a view where its strides allow, else a contiguous copy."""
    return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[0], -1)


def matrix_views(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return `matrix_view` of every tensor; the list itself where all of them have two axes."""
    return tensors if set(map(Tensor.dim, tensors)) == {2} else [matrix_view(tensor) for tensor in tensors]


def block_views(matrix: Tensor, tile: Tile) -> list[Tensor]:
    """The blocks of a tile, row by row, each a strided view [block rows, block columns] of `matrix`."""
    if tile.num_blocks == 1 and tile.block_shape == tuple(matrix.shape):
        return [matrix]
    (row_start, num_rows, rows), (col_start, num_cols, cols) = tile
    part = matrix[row_start : tile.rows.stop, col_start : tile.cols.stop]
    grid = part.unflatten(0, (num_rows, rows)).unflatten(2, (num_cols, cols)).transpose(1, 2)
    return [block for row in grid.unbind(0) for block in row.unbind(0)]


def tiles_from_ints(ints: Sequence[int], rows: int, cols: int) -> list[Tile]:
    """Tiles of blocks of rows × cols from their `Tile.as_ints`, laid end to end."""
    quadruples = zip(*(iter(ints),) * 4, strict=True)
    return [Tile(BlockRun(row, down, rows), BlockRun(col, across, cols)) for row, down, col, across in quadruples]


def tiled_blocks(lists: Sequence[Sequence[Tensor]], ints: Sequence[int], rows: int, cols: int) -> list[list[Tensor]]:
    """Return `blocks_of` for every list of tensors, from the `Tile.as_ints` of their tiles. Empty lists stay empty."""
    tiles = tiles_from_ints(ints, rows, cols)
    return [blocks_of(tensors, tiles) if tensors else [] for tensors in lists]


def blocks_of(tensors: Sequence[Tensor], tiles: Sequence[Tile]) -> list[Tensor]:
    """The block views [p, d] of one tile of each tensor, tile by tile and each row by row."""
    return [
        block for tensor, tile in zip(tensors, tiles, strict=True) for block in block_views(matrix_view(tensor), tile)
    ]
