"""Triton's kernels, and the device on which they are tested: a GPU, or the CPU in Triton's interpreter.

Modules of tests that import this are skipped where Triton is not installed.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before kernels are defined, for the interpreter or for a GPU

pytest.importorskip("triton", reason="Triton is not installed")

from rootfree_kernels import triton_kernels  # noqa: E402  after the above
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
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy's, of NaN in the interpreter
]
"""Marks of a test of Triton kernels, which runs on either device; the `pytestmark` of a module."""

needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU that PyTorch can use")


def module_of(stem: str) -> Any:
    """Return the file of a kernel; the package has the function under the same name."""
    return sys.modules[f"{triton_kernels.__name__}.{stem}"]
