"""Triton kernels, and the device for their tests: a GPU, or the CPU with Triton's interpreter.

If Triton is not installed, importing this module skips the test module that imports it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads this when a kernel is defined

pytest.importorskip("triton", reason="Triton is not installed")

from rootfree_kernels import triton_kernels  # noqa: E402  must follow the statements above
from rootfree_kernels.triton_kernels import launch as launches  # noqa: E402
from rootfree_kernels.triton_kernels import operators as triton_operators  # noqa: E402
from rootfree_kernels.triton_kernels import with_bmm as triton_with_bmm  # noqa: E402

__all__ = [
    "DEVICE",
    "kernel_test",
    "launches",
    "module_of",
    "needs_gpu",
    "triton_kernels",
    "triton_operators",
    "triton_with_bmm",
]

kernel_test = [
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy warns about NaN in the interpreter
]
"""Marks for tests of Triton kernels on either device, to be assigned to the `pytestmark` of a module."""

needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU that PyTorch can use")


def module_of(stem: str) -> Any:
    """Return the module of a kernel. The package's attribute of the same name is a function."""
    return sys.modules[f"{triton_kernels.__name__}.{stem}"]
