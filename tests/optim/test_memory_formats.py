"""Memory formats of weights and gradients make no difference. (`test_on_triton` has the same for Triton.)"""

from __future__ import annotations

import pytest
import torch

from tests.calls.cpu import needs_cpp
from tests.calls.tensors import BF16, FP32
from tests.optim.memory_formats import RULES, SHAPES, assert_formats_make_no_difference


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_cpp)])
def test_every_pair_of_memory_formats_gives_the_contiguous_result(
    monkeypatch: pytest.MonkeyPatch, backend: str, rule: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setenv("ROOTFREE_BACKEND", backend)
    assert_formats_make_no_difference(rule, shape, dtype)
