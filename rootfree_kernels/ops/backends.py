"""Which backend runs an operator.

Each backend describes itself (see `rootfree_kernels.backend`); this file lists them and chooses. A backend is chosen
once for a batch: the first of `BACKENDS` that is meant for the device and can serve. Measurements may change that order
(see `rootfree_kernels.ops.dispatch`). `ROOTFREE_BACKEND` forces one backend. A forced backend that cannot run is an
error that says why, never a silent fallback. So is a compiled extension that was built and cannot be imported.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import cache

import torch

from rootfree_kernels.backend import Backend, FactorDtypes
from rootfree_kernels.eager import EAGER
from rootfree_kernels.native import CPP, CUDA, EAGER_WITH_CUDA_MOMENTUM
from rootfree_kernels.triton_kernels import EAGER_WITH_TRITON_MOMENTUM, TRITON

logger = logging.getLogger(__name__)

BACKENDS = (TRITON, CUDA, CPP, EAGER_WITH_TRITON_MOMENTUM, EAGER_WITH_CUDA_MOMENTUM, EAGER)
"""All backends, best first. On a GPU Triton comes before CUDA, which has no matrix kernels, until `make gpu` has
measured them side by side."""

NAMES = tuple(backend.name for backend in BACKENDS if backend.is_selectable)
"""What a user may ask for with ROOTFREE_BACKEND."""

UNKNOWN = f"unknown backend: choose one of {', '.join(NAMES)}"

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of the parameters that the optimizers serve."""

_BY_NAME = {backend.name: backend for listed in BACKENDS for backend in (listed, *listed.variants.values())}


def named(name: str) -> Backend:
    """Return the backend of a name.

    Raises:
        RuntimeError: there is none.
    """
    if name not in _BY_NAME:
        raise RuntimeError(f"backend {name!r}: {UNKNOWN}")
    return _BY_NAME[name]


def why_not(name: str, device: torch.device, dtype: torch.dtype, factors: FactorDtypes | None = None) -> str | None:
    """Return why the backend `name` cannot serve parameters of `dtype` on `device`, or None if it can.

    `factors` are the dtypes of the factors for matrices, None for the diagonal step.

    Raises:
        ImportError: the compiled extension was built and cannot be imported.
    """
    if dtype not in DTYPES:
        return f"no backend serves {dtype}"
    if name not in _BY_NAME:
        return UNKNOWN
    return _BY_NAME[name].why_not(device, dtype, factors)


def forced(fused: bool | None = None) -> str | None:
    """Return the name of the backend that `fused=False` or ROOTFREE_BACKEND forces, or None."""
    return EAGER.name if fused is False else os.environ.get("ROOTFREE_BACKEND") or None


def candidates(device: torch.device) -> list[Backend]:
    """Return the backends that are chosen on a type of device without being asked for, best first."""
    return [backend for backend in BACKENDS if backend.devices is None or device.type in backend.devices]


def fused_backends(device: torch.device, dtype: torch.dtype, factors: FactorDtypes | None = None) -> list[Backend]:
    """Return all backends with kernels that can serve, whether or not they would be chosen, best first.

    Raises:
        ImportError: the compiled extension was built and cannot be imported.
    """
    return [x for x in BACKENDS if x.is_fused and why_not(x.name, device, dtype, factors) is None]


def choose(
    device: torch.device,
    dtype: torch.dtype,
    fused: bool | None = None,
    factors: FactorDtypes | None = None,
    favourite: str | None = None,
) -> Backend:
    """Return the backend for parameters of `dtype` on `device`, with `factors` if they are matrices.

    `fused=True` asks for a backend with kernels, `fused=False` for eager PyTorch. None leaves the choice to
    `ROOTFREE_BACKEND`, or else to the order of preference. No backend has kernels for FP64 or for meta tensors: eager
    PyTorch then serves `fused=True` too. A `favourite` that can serve comes before the order of preference; one that
    cannot is passed over.

    Raises:
        RuntimeError: the backend that was asked for cannot run; the message says why.
        ImportError: the compiled extension was built and cannot be imported.
    """
    asked_for = forced(fused)
    if asked_for and asked_for not in NAMES:
        reasons = {asked_for: UNKNOWN}
    else:
        if favourite and not asked_for and (named(favourite).is_fused or not fused):
            with suppress(ImportError):  # of a broken extension: an error only if the order of preference comes to it
                if why_not(favourite, device, dtype, factors) is None:
                    return _announced(named(favourite), device.type, dtype)
        reasons = {}
        for backend in [named(asked_for)] if asked_for else candidates(device):
            reason = why_not(backend.name, device, dtype, factors)
            if reason is None and fused and not backend.is_fused and _may_have_kernels(device, dtype):
                reason = "it has no fused kernels"
            if reason is None:
                return _announced(backend, device.type, dtype)
            if backend.is_selectable:
                reasons[backend.name] = reason
    asked = f"ROOTFREE_BACKEND={asked_for}" if asked_for and fused is None else f"fused={fused}"
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"{asked} cannot be served for {dtype} parameters on {device}: {why}. Leave it unset.")


def _may_have_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype != torch.float64 and device.type != "meta"


@cache
def _announced(backend: Backend, device_type: str, dtype: torch.dtype) -> Backend:
    logger.debug("backend %s serves %s parameters on %s", backend.name, dtype, device_type)
    return backend
