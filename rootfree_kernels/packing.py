"""Packed symmetric matrices: LAPACK's rectangular full packed format, n(n+1)/2 elements instead of n².

With k = ⌈n/2⌉, the lower triangle of a symmetric n × n matrix S consists of the lower triangle of A (k × k), the lower
triangle of D, and all of B::

    S = [A  Bᵀ]
        [B  D ]

B is a rectangle. The triangle of A and the transposed triangle of D fit together into another rectangle above it. In
LAPACK's terms this is TRANSR = 'N' and UPLO = 'L', here row by row. Digits are row and column of an element of S::

    n = 6:  33 43 53        n = 5:  00 33 43
            00 44 54                10 11 44
            10 11 55                20 21 22
            20 21 22                30 31 32
            30 31 32                40 41 42
            40 41 42
            50 51 52

Elements are copied bitwise, including signs of zero, and the host reads nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pieces(NamedTuple):
    """Views of the squares A and D and the rectangle B, in a batch of matrices that is packed or not."""

    a: Tensor
    b: Tensor
    d: Tensor


def packed_shape(size: int) -> tuple[int, int]:
    """Return the shape of a packed matrix of `size` rows."""
    return (size, (size + 1) // 2) if size % 2 else (size + 1, size // 2)


def pack(matrices: Tensor, out: Tensor) -> None:
    """Store symmetric matrices [L, n, n] in `out` [L, *packed_shape(n)].

    Only one of two mirrored elements is read: the one below the diagonal in A and B, the one above it in D. So a matrix
    that is symmetric up to roundings becomes bitwise symmetric.
    """
    source, packed = _pieces_of_square(matrices), _pieces_of_packed(out)
    packed.b.copy_(source.b)
    packed.a.copy_(source.a)  # all of it; D overwrites what is not its lower triangle
    torch.where(_everywhere(packed.d).triu(), source.d, packed.d, out=packed.d)


def unpack(packed: Tensor) -> Tensor:
    """Return symmetric matrices [L, n, n], in new memory, from packed ones [L, *packed_shape(n)]."""
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
    """Return m [L, n, n] of a factor of that shape: unpacked if it is packed, otherwise m itself."""
    return momentum if momentum.shape == factor.shape else unpack(momentum)


def put_back(matrices: Tensor, momentum: Tensor) -> None:
    """Pack the result of `as_matrices` if m was packed. Elements that have not changed stay bitwise the same."""
    if matrices is not momentum:
        pack(matrices, out=momentum)


def _pieces_of_square(matrices: Tensor) -> Pieces:
    half = (matrices.shape[-1] + 1) // 2
    return Pieces(matrices[:, :half, :half], matrices[:, half:, :half], matrices[:, half:, half:])


def _pieces_of_packed(packed: Tensor) -> Pieces:
    """Return the pieces of packed matrices. A and D overlap: A's lower triangle is one row below D's upper triangle, or
    one column left of it."""
    rows, cols = packed.shape[1:]
    down = int(rows > 2 * cols)  # 1 if n is even
    rest = rows - down - cols
    return Pieces(packed[:, down : down + cols], packed[:, down + cols :], packed[:, :rest, 1 - down :])


def _everywhere(squares: Tensor) -> Tensor:
    """Return a mask [k, k] of squares [L, k, k] that is True everywhere."""
    return torch.ones(squares.shape[1:], dtype=torch.bool, device=squares.device)
