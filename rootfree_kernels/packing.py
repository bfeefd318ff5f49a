"""Symmetric matrices stored once: LAPACK's rectangular full packed format, n(n+1)/2 numbers instead of n².

With k = ⌈n/2⌉ the lower triangle of a symmetric n × n matrix falls into the lower triangle of A (k × k), that of D and
all of B::

    S = [A  Bᵀ]
        [B  D ]

B is a rectangle already. The triangle of A and, transposed, that of D fit together to another one above it, in LAPACK's
terms TRANSR = 'N' and UPLO = 'L', here row by row. Digits are row and column of a number of S::

    n = 6:  33 43 53        n = 5:  00 33 43
            00 44 54                10 11 44
            10 11 55                20 21 22
            20 21 22                30 31 32
            30 31 32                40 41 42
            40 41 42
            50 51 52

Numbers are copied as they are, signs of zero included, and nothing is read by the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pieces(NamedTuple):
    """Views of a batch of matrices, packed or not: the squares A and D and the rectangle B."""

    a: Tensor
    b: Tensor
    d: Tensor


def packed_shape(size: int) -> tuple[int, int]:
    """Rows and columns of a packed matrix of `size` rows."""
    return (size, (size + 1) // 2) if size % 2 else (size + 1, size // 2)


def pack(matrices: Tensor, out: Tensor) -> None:
    """Store symmetric matrices [L, n, n] in `out` [L, *packed_shape(n)].

    Of every two numbers that mirror each other one is read, in A and B that below the diagonal and in D that above, so
    that a matrix which is symmetric but for roundings becomes symmetric to the bit.
    """
    source, packed = _pieces_of_square(matrices), _pieces_of_packed(out)
    packed.b.copy_(source.b)
    packed.a.copy_(source.a)  # whole, and D over what is not its lower triangle
    torch.where(_everywhere(packed.d).triu(), source.d, packed.d, out=packed.d)


def unpack(packed: Tensor) -> Tensor:
    """The symmetric matrices [L, n, n], in memory of their own, of packed ones [L, *packed_shape(n)]."""
    source = _pieces_of_packed(packed)
    half, rest = source.a.shape[-1], source.d.shape[-1]
    matrices = packed.new_empty((len(packed), half + rest, half + rest))
    target = _pieces_of_square(matrices)
    target.b.copy_(source.b)
    matrices[:, :half, half:].copy_(source.b.mT)
    torch.where(_everywhere(source.a).tril(), source.a, source.a.mT, out=target.a)
    torch.where(_everywhere(source.d).triu(), source.d, source.d.mT, out=target.d)
    return matrices


def as_matrices(momentum: Tensor, factor: Tensor) -> Tensor:
    """m [L, n, n] of a factor of that shape: itself, or unpacked where it is packed."""
    return momentum if momentum.shape == factor.shape else unpack(momentum)


def put_back(matrices: Tensor, momentum: Tensor) -> None:
    """Pack what `as_matrices` gave, where it was packed. What has not changed stays as it was, to the bit."""
    if matrices is not momentum:
        pack(matrices, out=momentum)


def _pieces_of_square(matrices: Tensor) -> Pieces:
    half = (matrices.shape[-1] + 1) // 2
    return Pieces(matrices[:, :half, :half], matrices[:, half:, :half], matrices[:, half:, half:])


def _pieces_of_packed(packed: Tensor) -> Pieces:
    """A and D overlap: A's lower triangle lies below D's upper one, by a row or else left of it by a column."""
    rows, cols = packed.shape[1:]
    down = int(rows > 2 * cols)  # 1 of an even number of rows of S
    rest = rows - down - cols
    return Pieces(packed[:, down : down + cols], packed[:, down + cols :], packed[:, :rest, 1 - down :])


def _everywhere(squares: Tensor) -> Tensor:
    """A condition [k, k] that is true everywhere, of squares [L, k, k]."""
    return torch.ones(squares.shape[1:], dtype=torch.bool, device=squares.device)
