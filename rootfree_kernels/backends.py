"""Which room runs an operator: Triton, CUDA, C++ or eager PyTorch.

A backend is a module with the operators' functions under their own names (see `rootfree_kernels.eager`). It is chosen
once for a batch, best first: triton, cuda, eager on a GPU; cpp, eager on a CPU. What was measured may change that order
(`rootfree_kernels.dispatch`). `ROOTFREE_BACKEND` forces one, and one that cannot run is an error that says why, never a
silent fallback. A compiled extension that was built and cannot be imported is an error too.
"""

from __future__ import annotations

import json
import logging
import os
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module, resources
from types import ModuleType
from typing import Any

import torch

from rootfree_kernels import eager

logger = logging.getLogger(__name__)

PREFERENCE = {"cuda": ("triton", "cuda", "eager"), "cpu": ("cpp", "eager")}
"""Backends by type of device, best first; any other device is served by eager PyTorch. On a GPU Triton comes before
CUDA, which has no matrix kernels, as long as `make gpu` has not measured them side by side."""

BACKENDS: dict[str, ModuleType] = {"eager": eager}
"""The backends that were imported; others are when they are first asked for."""

COMPILED = ("cuda", "cpp")
"""Parts of the extension `rootfree_kernels._C`."""

NAMES = ("triton", *COMPILED, "eager")
"""What a user may ask for. Beside them there is `triton_bmm`, Triton's kernels with the symmetric products by cuBLAS,
which dispatch alone puts in the place of triton."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of the parameters that the optimizers serve."""

FactorDtypes = tuple[torch.dtype, "torch.dtype | None"]
"""Dtypes in which the factors of a batch are stored and multiplied; None leaves the latter to the backend."""


def _record_names() -> tuple[str, str]:
    """Return the names of the file that setup.py writes: that of this Python in a source tree, where several may have
    built, and `_build.json` in a wheel."""
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


_WIDE = "its arithmetic is FP32, and parameters or state are FP64"


def why_not(backend: str, device: torch.device, dtype: torch.dtype, factors: FactorDtypes | None = None) -> str | None:
    """Why `backend` cannot serve parameters of `dtype` on `device` (with `factors` for matrices); None where it can."""
    if dtype not in DTYPES:
        return f"no backend serves {dtype}"
    if backend not in NAMES:
        return f"unknown backend: choose one of {', '.join(NAMES)}"
    if backend == "triton":
        return _why_not_triton(device, dtype, factors)
    if backend not in PREFERENCE.get(device.type, ("eager",)):
        return f"it does not run on {device.type} devices"
    if backend in COMPILED:
        return _why_not_compiled(backend, device, dtype, factors)
    return None


def _why_not_compiled(
    backend: str, device: torch.device, dtype: torch.dtype, factors: FactorDtypes | None
) -> str | None:
    if dtype == torch.float64:
        return _WIDE
    if backend == "cuda" and factors is not None:
        return "it has no matrix kernels"
    if factors is not None and not {*factors} <= {torch.float32, torch.bfloat16, None}:
        return f"its matrix products are of FP32 and BF16, not of {' and '.join(map(str, factors))}"
    if reason := build_record()["left_out"][backend]:
        return f"it was not built: {reason}"
    if problem := _import_problem(backend):
        raise ImportError(
            f"rootfree_kernels._C was built and is broken: {problem}. Reinstall the package against this PyTorch "
            f"({torch.__version__}), or do without: ROOTFREE_BACKEND=eager."
        )
    return _why_not_gpu(device)


def _why_not_gpu(device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (A100) or later"
    return None


def _why_not_triton(device: torch.device, dtype: torch.dtype, factors: FactorDtypes | None) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "it does not run on cpu devices, other than under TRITON_INTERPRET=1 to test kernels"
    if device.type not in ("cuda", "cpu"):
        return f"it does not run on {device.type} devices"
    if device.type == "cuda" and interpreted:
        return "TRITON_INTERPRET=1 is set, and the interpreter runs kernels on the CPU"
    if dtype == torch.float64:
        return _WIDE
    if factors is not None and (factors[0] != torch.bfloat16 or factors[1] not in (None, torch.bfloat16)):
        return f"its matrix products are of BF16, not of {factors[1] or factors[0]}"
    if problem := _import_problem("triton"):
        return problem
    return _why_not_gpu(device)


@cache
def _import_problem(backend: str) -> str | None:
    """Import a backend; why that failed, or None."""
    try:
        BACKENDS.setdefault(backend, import_module(f"rootfree_kernels.{backend}_kernels"))
    except Exception as error:  # a broken install raises anything
        logger.warning("backend %s cannot be imported: %s: %s", backend, type(error).__name__, error)
        return f"it cannot be imported: {type(error).__name__}: {error}"
    return None


def forced(fused: bool | None = None) -> str | None:
    """The backend that stands fixed whatever was measured: eager with `fused=False`, else that of ROOTFREE_BACKEND."""
    return "eager" if fused is False else os.environ.get("ROOTFREE_BACKEND") or None


def choose(
    device: torch.device,
    dtype: torch.dtype,
    fused: bool | None = None,
    factors: FactorDtypes | None = None,
    favourite: str | None = None,
) -> str:
    """The name of the backend for parameters of `dtype` on `device`, with `factors` where they are matrices.

    `fused=True` asks for a kernel backend, `fused=False` for eager PyTorch, None leaves the choice to
    `ROOTFREE_BACKEND`, or else to the order of preference. Where that leaves a choice, `favourite` comes first if it
    can serve; it never makes anything fail.

    Raises:
        RuntimeError: the backend that was asked for cannot run; the message says why.
        ImportError: the compiled extension was built and cannot be imported.
    """
    asked_for = forced(fused)
    if favourite and not asked_for and not (fused and favourite == "eager"):
        with suppress(ImportError):  # of a broken extension, which is an error where the order comes to it
            if why_not(favourite, device, dtype, factors) is None:
                return _announced(favourite, device.type, dtype)
    candidates = (asked_for,) if asked_for else PREFERENCE.get(device.type, ("eager",))
    reasons = {}
    for name in candidates:
        reason = why_not(name, device, dtype, factors)
        if reason is None and fused and name == "eager":
            reason = "it has no fused kernels"
        if reason is None:
            return _announced(name, device.type, dtype)
        reasons[name] = reason
    asked = f"ROOTFREE_BACKEND={asked_for}" if asked_for and fused is None else f"fused={fused}"
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"{asked} cannot be served for {dtype} parameters on {device}: {why}. Leave it unset.")


@cache
def _announced(name: str, device_type: str, dtype: torch.dtype) -> str:
    logger.debug("backend %s serves %s parameters on %s", name, dtype, device_type)
    return name


def is_captured(device: torch.device) -> bool:
    """Whether work for `device` is recorded in a CUDA graph now, to run when that is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def implementation(backend: str, operator: str) -> Callable[..., Any]:
    """The function of `backend` that implements `operator`."""
    if backend not in BACKENDS and (problem := _import_problem(backend)):
        raise RuntimeError(f"backend {backend!r}: {problem}")
    function: Callable[..., Any] = getattr(BACKENDS[backend], operator)
    return function


def makes_products(backend: str) -> bool:
    """Whether an update takes P_C = CCᵀ and P_K = KKᵀ on the way, kept or not: kernels save half their multiplications
    by symmetry, so that P_C·G·P_K takes three quarters of the work of CCᵀ·G·KKᵀ."""
    return backend in ("triton", "triton_bmm", "cpp")


def matmul_dtype(factor_dtype: torch.dtype, device: torch.device, backend: str = "eager") -> torch.dtype:
    """The dtype in which `backend` multiplies factors of `factor_dtype` on `device`, where nothing else is asked for.

    BF16 factors are multiplied in BF16 where the processor has instructions for it, and in FP32 elsewhere: on a CPU
    with AVX512_BF16 a BF16 product took a quarter of the time of an FP32 one, and 1.3 times as long with these
    instructions switched off (`python -m bench.cpu_step`, and again under ONEDNN_MAX_CPU_ISA=AVX512_CORE).
    """
    is_library = backend in ("eager", "cpp") and device.type == "cpu"
    if is_library and factor_dtype == torch.bfloat16 and not _cpu_multiplies_bf16():
        return torch.float32
    return factor_dtype


@cache
def _cpu_multiplies_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
