"""Which room runs an operator: eager PyTorch today; Triton, CUDA and C++ as they come.

A backend is a module with the operators' functions under their own names (see `rootfree_kernels.eager`). It is chosen
once for a batch, best first: cuda, triton, eager on a GPU; cpp, eager on a CPU. `ROOTFREE_BACKEND` forces one, and one
that cannot run is an error that says why, never a silent fallback.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import resources
from types import ModuleType
from typing import Any

import torch

from rootfree_kernels import eager

logger = logging.getLogger(__name__)

PREFERENCE = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpp", "eager")}
"""Backends by type of device, best first; any other device is served by eager PyTorch."""

BACKENDS: dict[str, ModuleType] = {"eager": eager}
"""The backends of this version."""

NAMES = ("cuda", "triton", "cpp", "eager")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of the parameters that the optimizers serve."""


def build_record() -> dict[str, Any]:
    """What the installation compiled and what it left out, and why (`_build.json`, written by setup.py)."""
    try:
        return dict(json.loads(resources.files("rootfree_kernels").joinpath("_build.json").read_text()))
    except FileNotFoundError:
        reason = "no record of a build: the package was not installed but found on the path"
        return {"extension": False, "left_out": {"cpp": reason, "cuda": reason}}


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve parameters of `dtype` on `device`; None where it can."""
    if dtype not in DTYPES:
        return f"no backend serves {dtype}"
    if backend not in NAMES:
        return f"unknown backend: choose one of {', '.join(NAMES)}"
    if backend not in PREFERENCE.get(device.type, ("eager",)):
        return f"it does not run on {device.type} devices"
    if backend not in BACKENDS:
        return "this version has no kernels for it yet"
    return None


def choose(device: torch.device, dtype: torch.dtype, fused: bool | None = None) -> str:
    """The name of the backend for parameters of `dtype` on `device`.

    `fused=True` asks for a kernel backend, `fused=False` for eager PyTorch, None leaves the choice to
    `ROOTFREE_BACKEND`, or else to the order of preference.

    Raises:
        RuntimeError: the backend that was asked for cannot run; the message says why.
    """
    forced = "eager" if fused is False else os.environ.get("ROOTFREE_BACKEND") or None
    candidates = (forced,) if forced else PREFERENCE.get(device.type, ("eager",))
    reasons = {}
    for name in candidates:
        reason = why_not(name, device, dtype)
        if reason is None and fused and name == "eager":
            reason = "it has no fused kernels"
        if reason is None:
            return _announced(name, device.type, dtype)
        reasons[name] = reason
    asked = f"ROOTFREE_BACKEND={forced}" if forced and fused is None else f"fused={fused}"
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"{asked} cannot be served for {dtype} parameters on {device}: {why}. Leave it unset.")


@cache
def _announced(name: str, device_type: str, dtype: torch.dtype) -> str:
    logger.debug("backend %s serves %s parameters on %s", name, dtype, device_type)
    return name


def implementation(backend: str, operator: str) -> Callable[..., Any]:
    """The function of `backend` that implements `operator`."""
    function: Callable[..., Any] = getattr(BACKENDS[backend], operator)
    return function


def num_partial_sums(backend: str) -> int:
    """Partial sums a block that `kron_gather` of `backend` hands on."""
    return getattr(BACKENDS[backend], "NUM_PARTIAL_SUMS", 0)


def makes_products(backend: str) -> bool:
    """Whether an update takes P_C = CCᵀ and P_K = KKᵀ on the way, kept or not: kernels save half their multiplications
    by symmetry, so that P_C·G·P_K takes three quarters of the work of CCᵀ·G·KKᵀ."""
    return backend in ("cuda", "triton")


def matmul_dtype(factor_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which factors of `factor_dtype` are multiplied on `device`.

    BF16 factors are multiplied in BF16 where the processor has instructions for it, and in FP32 elsewhere: on a CPU
    with AVX512_BF16 a BF16 product took a quarter of the time of an FP32 one, and 1.3 times as long with these
    instructions switched off (`python -m bench.cpu_step`, and again under ONEDNN_MAX_CPU_ISA=AVX512_CORE).
    """
    if factor_dtype == torch.bfloat16 and device.type == "cpu" and not _cpu_multiplies_bf16():
        return torch.float32
    return factor_dtype


@cache
def _cpu_multiplies_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)
