"""Where the tests of the Triton kernels run: on a GPU where there is one, elsewhere in Triton's interpreter.

Import this before anything that imports Triton: kernels are made for the one or the other when they are defined.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton", reason="Triton is not installed")

kernel_test = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
"""Marks of a test that runs on either; `pytestmark` of a module."""

needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU that PyTorch can use")
