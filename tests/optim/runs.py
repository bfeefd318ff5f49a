"""Training runs for tests, with a first and a second range of steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.calls.optimizers import Case, Model, gradients, snapshot, train

BEFORE, AFTER = range(3), range(3, 6)
"""Steps before and after a test changes something."""


def trained(case: Case, steps: Any = BEFORE, **changes: Any) -> tuple[Model, torch.optim.Optimizer]:
    model, optimizer = case.start(**changes)
    train(model, optimizer, steps)
    return model, optimizer


def results(case: Case, steps: Any = BEFORE, **changes: Any) -> dict[str, Tensor]:
    """Return all weights and state after some steps of a new run."""
    return snapshot(trained(case, steps, **changes)[1])


def set_gradients(params: list[Tensor], step: int) -> None:
    shapes = [tuple(param.shape) for param in params]
    for param, grad in zip(params, gradients(shapes, step, params[0].dtype), strict=True):
        param.grad = grad
