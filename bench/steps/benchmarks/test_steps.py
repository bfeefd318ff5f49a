"""Benchmark steps in units of what bounds them: matrix products for IFShampoo, a copy or fused AdamW for RFRMSProp.

    make bench-pytest                                    measures, and saves to .benchmarks/
    make bench-pytest PYTEST_ARGS='--benchmark-compare --benchmark-compare-fail=median:15%'

The limits here are wide: they catch a backend that is not used, and a step that does its work twice. A comparison with
an earlier run catches the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bench.common.optimizers import ADAMW, WHOLE
from bench.common.roofline import diagonal_bytes
from rootfree_kernels import IFShampoo, RFRMSProp
from rootfree_kernels.eager import cpu_matmul_dtype

SIDE = 1024
LAYERS = 12
NUMBERS = 4_000_000
SMALL = 500

BF16, FP32 = torch.bfloat16, torch.float32
PRODUCTS = {"update": 9.0, "other step": 2.0}
"""Operations of an n × n step over those of one product: 18n³ and 4n³ over 2n³."""

SLACK = 3.0


def weights(count: int, *shape: int) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(shape, generator=generator)
    return params


def product(dtype: torch.dtype, layers: int, side: int) -> Callable[[], Tensor]:
    a, b = (torch.randn(layers, side, side).to(dtype) for _ in range(2))
    return partial(torch.bmm, a, b)


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("layers", "side"), [(1, SIDE), (LAYERS, 256)], ids=["one 1024²", "twelve 256²"])
def test_if_shampoo_in_products(in_units_of, layers, side, dtype, kind):
    period = 1 if kind == "update" else 1 << 30
    options = {"factor_dtype": dtype, "precondition_frequency": period, "cache_products": True}
    optimizer = IFShampoo(weights(layers, side, side), lr=1e-4, batch_size=16, **options)
    optimizer.step()
    multiplied = cpu_matmul_dtype(dtype, torch.device("cpu"))
    ratio = in_units_of(product(multiplied, layers, side), optimizer.step)
    assert ratio < SLACK * PRODUCTS[kind]


@pytest.mark.parametrize("state", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("count", "size"), [(1, NUMBERS), (SMALL, 1000)], ids=["one large", "many small"])
def test_rf_rmsprop_in_steps_of_adamw(in_units_of, count, size, state):
    optimizer = RFRMSProp(weights(count, size), lr=1e-4, batch_size=16, state_dtype=state)
    adamw = ADAMW(weights(count, size), 1, WHOLE)
    assert in_units_of(adamw.step, optimizer.step) < SLACK


def test_rf_rmsprop_in_copies(in_units_of):
    optimizer = RFRMSProp(weights(1, NUMBERS), lr=1e-4, batch_size=16)
    source, target = torch.randn(NUMBERS), torch.empty(NUMBERS)
    ratio = in_units_of(partial(target.copy_, source), optimizer.step)
    assert ratio < SLACK * diagonal_bytes(FP32, FP32, FP32) / 8
