"""The compiled extension `rootfree_kernels._C`: C++ kernels for CPUs (`cpu`) and CUDA kernels for GPUs (`cuda`).

`table_calls` holds what both share. This file describes the two backends without importing the extension.
"""

from __future__ import annotations

import json
import sysconfig
from contextlib import suppress
from functools import cache
from importlib import resources
from typing import Any

import torch

from rootfree_kernels.backend import FP64_PROBLEM, Backend, FactorDtypes, momentum_problem, old_gpu_problem
from rootfree_kernels.eager import cpu_matmul_dtype


def _record_names() -> tuple[str, str]:
    """Return the names of the file that setup.py writes: one for this Python in a source tree, where several Pythons
    may have built, and `_build.json` in a wheel."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ""
    return f"_build{suffix.rpartition('.')[0]}.json", "_build.json"


@cache
def build_record() -> dict[str, Any]:
    """Return what the installation compiled and what it left out, and why, as setup.py recorded it."""
    for name in _record_names():
        with suppress(FileNotFoundError):
            return dict(json.loads(resources.files("rootfree_kernels").joinpath(name).read_text()))
    reason = "no record of a build: the package was not installed but found on the path"
    return {"extension": False, "left_out": {"cpp": reason, "cuda": reason}}


def _build_problem(backend: Backend) -> str | None:
    """Return why the extension has no part for `backend`, or None.

    Raises:
        ImportError: the extension was built and cannot be imported.
    """
    if reason := build_record()["left_out"][backend.name]:
        return f"it was not built: {reason}"
    if problem := backend.import_problem:
        raise ImportError(
            f"rootfree_kernels._C was built and is broken: {problem}. Reinstall the package against this PyTorch "
            f"({torch.__version__}), or do without: ROOTFREE_BACKEND=eager."
        )
    return None


def _why_not_cpp(device: torch.device, dtype: torch.dtype, factors: FactorDtypes | None) -> str | None:
    if device.type != "cpu":
        return f"it does not run on {device.type} devices"
    if dtype == torch.float64:
        return FP64_PROBLEM
    if factors is not None and not {*factors} <= {torch.float32, torch.bfloat16, None}:
        return f"its matrix products are of FP32 and BF16, not of {' and '.join(map(str, factors))}"
    return _build_problem(CPP)


def _why_not_cuda(device: torch.device, dtype: torch.dtype, factors: FactorDtypes | None) -> str | None:
    if device.type != "cuda":
        return f"it does not run on {device.type} devices"
    if dtype == torch.float64:
        return FP64_PROBLEM
    if factors is not None:
        return "it has no matrix kernels"
    return _build_problem(CUDA) or old_gpu_problem(device)


def _why_not_cuda_momentum(device: torch.device, dtype: torch.dtype, factors: FactorDtypes | None) -> str | None:
    return momentum_problem(factors) or _why_not_cuda(device, torch.float32, None)


CPP = Backend(
    name="cpp",
    module="rootfree_kernels.native.cpu",
    devices=("cpu",),
    why_not=_why_not_cpp,
    makes_products=True,
    matmul_dtype=cpu_matmul_dtype,
)

CUDA = Backend(
    name="cuda",
    module="rootfree_kernels.native.cuda",
    devices=("cuda",),
    why_not=_why_not_cuda,
    serves_matrices=False,
)

EAGER_WITH_CUDA_MOMENTUM = Backend(
    name="eager_with_cuda_momentum",
    module="rootfree_kernels.native.cuda_with_eager_matrices",
    devices=("cuda",),
    why_not=_why_not_cuda_momentum,
    is_selectable=False,
    is_fused=False,
)
