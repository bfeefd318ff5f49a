"""Steps under `torch.compile`. test_compiled_step.py tests them with `capturable=True`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.calls.optimizers import Case, gradients, snapshot, train
from tests.calls.tensors import assert_same_bits

BACKEND = "aot_eager"  # traces and functionalizes a graph, and runs it without code generation


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def test_a_compiled_step_matches_the_eager_step(case: Case) -> None:
    """Results are bitwise equal. Steps include the first, which creates the state, and the third update at T = 3."""
    steps = range(8)
    model, optimizer = case.start()
    compiled = torch.compile(optimizer.step, backend=BACKEND)
    for step in steps:
        optimizer.zero_grad()
        model(step).backward()
        compiled()
    eager_model, eager = case.start()
    train(eager_model, eager, steps)
    assert_same_bits(snapshot(optimizer), snapshot(eager))


def regression(case: Case, **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    """Return a model that the compiler can trace, its optimizer, and data."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)).to(case.dtype)
    shapes = [tuple(param.shape) for param in model.parameters()]
    with torch.no_grad():
        for param, value in zip(model.parameters(), gradients(shapes, -1, case.dtype), strict=True):
            param.copy_(value)
    (data,) = gradients([(8, 5)], 0, case.dtype)
    return model, case.make(model.parameters(), **changes), data


def fit_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor) -> None:
    optimizer.zero_grad()
    (model(data) - data).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "float"])
def test_a_changing_lr_recompiles_nothing_and_takes_effect(case: Case, as_tensor: bool) -> None:
    """A whole training step is compiled. The first two calls may compile, because only the second has gradients."""
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(fit_step, backend=counter)
    lr = torch.tensor(0.01)
    run, eager = regression(case, lr=lr if as_tensor else 0.01), regression(case)
    frames = []
    for step in range(6):
        value = 0.01 / (1 + step)
        if as_tensor:
            lr.fill_(value)
        else:
            run[1].param_groups[0]["lr"] = value
        eager[1].param_groups[0]["lr"] = value
        compiled(*run)
        fit_step(*eager)
        frames.append(counter.frame_count)
    assert frames[0] >= 1
    assert frames[1:] == [frames[1]] * 5
    assert_same_bits(snapshot(run[1]), snapshot(eager[1]))
