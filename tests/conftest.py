"""Configuration of pytest, and fixtures that several folders use."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the CPU, slowly

pytest.register_assert_rewrite(*(f"tests.{name}" for name in ("calls", "cpp", "cuda", "eager", "optim", "reference")))

from tests.calls.optimizers import CASES, Case  # noqa: E402  after both of the above


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param
