"""Steps on fake tensors, by which tools estimate memory without data."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rootfree_kernels import RECIPE
from tests.calls.optimizers import Case, Model, gradients

OPTIONS = ({}, {"precondition_frequency": 2}, {"precondition_frequency": lambda step: step % 3 == 0}, RECIPE)


@pytest.mark.parametrize("backend", ["", "eager"], ids=["best backend", "eager"])
@pytest.mark.parametrize("capturable", [False, True], ids=["default", "capturable"])
def test_steps_run_on_fake_tensors(case: Case, backend: str, capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOTFREE_BACKEND", backend)
    for options in OPTIONS if case.is_shampoo else ({},):
        if capturable and "precondition_frequency" in {**case.options, **options}:
            continue
        run_on_fake_tensors(case, {**options, "capturable": capturable})


def run_on_fake_tensors(case: Case, options: dict[str, Any]) -> None:
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns if the address of a fake tensor is asked for
        model = Model(case.dtype)
        optimizer = case.make(model.parameters(), **options)
        for step in range(3):
            grads = gradients([param.shape for param in model.parameters()], step, case.dtype)
            for param, grad in zip(model.parameters(), grads, strict=True):
                param.grad = grad
            optimizer.step()
        assert all(isinstance(x, FakeTensor) for state in optimizer.state.values() for x in state.values())
