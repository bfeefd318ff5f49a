"""Factors without damping: the curvature of rows and columns without gradients is 0, and their factors grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rootfree_kernels import RECIPE, IFShampoo

UNDAMPED = {"lr": 1e-3, "batch_size": 16, "damping": 0.0, "beta2": 0.9}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [None, False], ids=["best backend", "eager"])
@pytest.mark.parametrize("idle", ["all", "columns"])
@pytest.mark.parametrize("rule", [{}, {**RECIPE, "damping": 0.0}], ids=["paper", "recipe"])
def test_factors_without_gradients_stop_growing(
    idle: str, fused: bool | None, dtype: torch.dtype, rule: dict[str, Any]
) -> None:
    """Without a bound the factors overflow within 600 steps, and the block stays skipped."""
    param, generator = nn.Parameter(torch.zeros(8, 12)), torch.Generator().manual_seed(0)
    optimizer = IFShampoo([param], **{**rule, **UNDAMPED}, fused=fused, factor_dtype=dtype)
    for _ in range(600):
        param.grad = torch.zeros(8, 12)
        if idle == "columns":
            param.grad[:, 3:] = torch.randn(8, 9, generator=generator) * 0.1
        optimizer.step()
    state, before = optimizer.state[param], param.detach().clone()
    assert all(value.isfinite().all() for value in state.values())
    param.grad = torch.randn(8, 12, generator=generator) * 0.1
    optimizer.step()
    assert int(state["skipped"].sum()) == 0
    assert param.isfinite().all()
    assert (param != before)[:, :3].any(0).all()  # the idle columns move


def test_the_bound_leaves_other_steps_alone() -> None:
    """In FP64 a step without damping is the step with the smallest damping there is."""
    finals = []
    for damping in (0.0, 5e-324):
        param = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
        optimizer = IFShampoo([param], **{**UNDAMPED, "damping": damping}, factor_dtype=torch.float64)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            param.grad = torch.randn(6, 5, generator=generator, dtype=torch.float64)
            optimizer.step()
        finals.append(param.detach())
    assert torch.equal(*finals)
