"""Optimizers and helpers for tests of saved and resumed runs."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from rootfree_kernels import RECIPE, GrowingInterval, IFShampoo, RFRMSProp
from tests.calls.optimizers import CASES, Case, Model, snapshot, train

FIRST, SECOND = range(5), range(5, 10)


def every_fourth(step: int) -> bool:
    return step % 4 == 0


bf16 = torch.bfloat16
RESUMED = [
    *CASES,
    Case("IFShampoo-growing-interval", IFShampoo, {"precondition_frequency": GrowingInterval(3)}),
    Case("IFShampoo-callable", IFShampoo, {"precondition_frequency": every_fourth}),
    Case("IFShampoo-stochastic-bf16-weights", IFShampoo, {}, bf16),
    Case("IFShampoo-bf16-state", IFShampoo, {"state_dtype": bf16, "rounding": "nearest"}),
    Case("IFShampoo-packed", IFShampoo, {"packed_momentum": True, "state_dtype": bf16, "cache_products": False}),
    Case("IFShampoo-fp64-factors", IFShampoo, {"factor_dtype": torch.float64}),
    Case("IFShampoo-capturable", IFShampoo, {"capturable": True}),
    Case(
        "IFShampoo-recipe-compensated-bf16",
        IFShampoo,
        {**RECIPE, "rounding": "compensated", "weight_rounding": "compensated", "state_dtype": bf16},
        bf16,
    ),
    Case(
        "IFShampoo-recipe-root-free-T2-tiles",
        IFShampoo,
        {**RECIPE, "direction": "root_free", "precondition_frequency": 2, "max_preconditioner_dim": 3},
    ),
    Case("RFRMSProp-stochastic-bf16-state", RFRMSProp, {"state_dtype": bf16}, bf16),
    Case(
        "RFRMSProp-compensated-bf16-state",
        RFRMSProp,
        {"state_dtype": bf16, "rounding": "compensated", "weight_rounding": "compensated"},
        bf16,
    ),
]
resumed = pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)


def through_file(saved: Any) -> Any:
    """Save to a file and load from it with `weights_only=True`."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def newcomer(case: Case) -> tuple[Model, torch.optim.Optimizer]:
    """Return another model and an optimizer of the same class with default options.

    Callables are the only options that it shares with the case, because checkpoints cannot contain them.
    """
    model = Model(case.dtype, seed=-2)
    callables = {name: value for name, value in case.options.items() if callable(value)}
    return model, case.optimizer(model.parameters(), batch_size=1, **callables)


def uninterrupted(case: Case) -> dict[str, torch.Tensor]:
    model, optimizer = case.start()
    train(model, optimizer, [*FIRST, *SECOND])
    return snapshot(optimizer)


def flat(state: dict[Any, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the tensors of all parameters by one name each."""
    return {f"{index} {name}": value for index, entries in state.items() for name, value in entries.items()}
