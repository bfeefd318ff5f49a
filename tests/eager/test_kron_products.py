"""CCᵀ and KKᵀ in eager PyTorch."""

from __future__ import annotations

import pytest
import torch

from rootfree_kernels.eager.products import gram
from tests.calls.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 127, 128, 131])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gram_matrix_equals_the_full_product(dtype, size, transposed):
    x = torch.randn(2, 50, size, generator=torch.Generator().manual_seed(0)).to(dtype).mT
    x = x if transposed else x.contiguous()
    out = torch.full((2, size, size), torch.nan, dtype=dtype)
    assert gram(x, out=out) is out
    expected = x.double() @ x.double().mT
    for actual in (out, gram(x)):
        assert_close(actual, expected.numpy(), dtype)
        if size >= 128 and dtype != torch.bfloat16:
            assert torch.equal(actual[:, : size // 2, size // 2 :], actual[:, size // 2 :, : size // 2].mT)
