"""Configuration of pytest, and shared fixtures."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # run Triton kernels in its interpreter; set before its import

pytest.register_assert_rewrite(*(f"tests.{name}" for name in ("calls", "cpp", "cuda", "eager", "optim", "reference")))

from tests.calls.optimizers import CASES, Case  # noqa: E402  must come after the two statements above


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param
