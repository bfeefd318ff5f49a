"""Packed storage of symmetric matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rootfree_kernels.packing import pack, packed_shape, unpack
from tests.calls.optimizers import gradients
from tests.calls.tensors import BF16, FP32, FP64, same_bits

SIZES = [*range(1, 10), 128, 255]


def symmetric(num: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return random matrices with zeros of both signs and an infinity."""
    (numbers,) = gradients([(num, size, size)], size, dtype)
    for place, value in enumerate((0.0, -0.0, torch.inf)):
        numbers.view(-1)[place * size % numbers.numel()] = value
    return torch.where(torch.ones(size, size, dtype=torch.bool).tril(), numbers, numbers.mT)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_packing_and_unpacking_keeps_every_bit(size: int, dtype: torch.dtype) -> None:
    matrices = symmetric(3, size, dtype)
    packed = torch.full((3, *packed_shape(size)), torch.nan, dtype=dtype)
    assert packed[0].numel() == size * (size + 1) // 2
    pack(matrices, packed)
    assert same_bits(unpack(packed), matrices)


@pytest.mark.parametrize(
    "rows",
    [
        ["00"],
        ["11", "00", "10"],
        ["00 22", "10 11", "20 21"],
        ["00 33 43", "10 11 44", "20 21 22", "30 31 32", "40 41 42"],
        ["33 43 53", "00 44 54", "10 11 55", "20 21 22", "30 31 32", "40 41 42", "50 51 52"],
    ],
    ids=len,
)
def test_format_matches_the_examples_of_lapack(rows: list[str]) -> None:
    """Examples from LAPACK's documentation (TRANSR = 'N', UPLO = 'L'). Digits are the row and the column."""
    expected = torch.tensor([[float(digits) for digits in row.split()] for row in rows])
    size = int(expected.max() // 10) + 1
    index = torch.arange(size)
    row, col = torch.maximum(index[:, None], index), torch.minimum(index[:, None], index)
    packed = torch.empty(1, *packed_shape(size))
    pack((10.0 * row + col)[None], packed)
    assert torch.equal(packed[0], expected)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_an_almost_symmetric_matrix_becomes_exactly_symmetric(size: int) -> None:
    """Both elements of a symmetric pair get the value of one of them."""
    matrices = gradients([(2, size, size)], 0, FP32)[0]
    packed = torch.empty(2, *packed_shape(size))
    pack(matrices, packed)
    result = unpack(packed)
    assert torch.equal(result, result.mT)
    assert ((result == matrices) | (result == matrices.mT)).all()
