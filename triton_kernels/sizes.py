"""Sizes that kernels, launchers and memory estimates agree on. Nothing here imports Triton."""

from __future__ import annotations

PADDING = 8
"""Sides of G are padded to a multiple of this, so that every row of BF16 begins on a 16-byte boundary."""

MAX_PARTIAL_SUMS = 512
"""The most programs of `kron_gather` for a block. With two blocks of 4096 × 4096, each of 132 multiprocessors gets
seven programs of eight rows. Kernels that read the partial sums load all those of a block at once."""

ELEMENTS_PER_PROGRAM = 1 << 15
"""Elements of G that one program of `kron_gather` works on, or more if MAX_PARTIAL_SUMS programs are too few."""


def padded(size: int) -> int:
    """Return `size` rounded up to a multiple of PADDING."""
    return -(-size // PADDING) * PADDING


def num_partial_sums(rows: int, cols: int) -> int:
    """Return how many partial sums of squares `kron_gather` writes for a block of rows × cols."""
    return min(MAX_PARTIAL_SUMS, max(1, rows * cols // ELEMENTS_PER_PROGRAM))


def num_start_programs(rows: int, cols: int) -> int:
    """Return how many programs of `kron_start` write the factors of a block of rows × cols."""
    return min(MAX_PARTIAL_SUMS, max(1, (rows * rows + cols * cols) // ELEMENTS_PER_PROGRAM))


STEP_ROWS, STEP_COLS = 8, 128
"""Rows and columns of a tile of `kron_apply`."""

TILES_PER_PROGRAM = 8
"""Tiles that one program of `kron_apply` works on, or more if MAX_PARTIAL_SUMS programs are too few."""


def num_step_programs(rows: int, cols: int) -> int:
    """Return how many programs of `kron_apply` work on a block of rows × cols."""
    tiles = -(-rows // STEP_ROWS) * -(-cols // STEP_COLS)
    return min(MAX_PARTIAL_SUMS, -(-tiles // TILES_PER_PROGRAM))
