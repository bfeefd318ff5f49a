"""Calls of operators, either through the Python functions of a backend or through PyTorch's dispatcher.

All tests call operators through this module. They pass flat lists of arguments in the order of the schemas of
`torch.ops.rootfree`, without the name of the backend. Only `call` and `flat_arguments` know the signatures of the
backends' functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rootfree_kernels.ops.backends import named
from rootfree_kernels.ops.operators import run_flat

Call = Callable[..., Any]
"""A function (stem, *flat arguments) that runs an operator."""

STEMS = ("rf_rmsprop", "scaled_rmsprop", "clipped_momentum", "kron_gather", "kron_factor", "kron_step")
"""The operators of `torch.ops.rootfree`. Backends also have `kron_products`, which is not an operator."""


def call(backend: str, stem: str, *flat: Any) -> Any:
    """Call the Python function of a backend with a flat list of arguments."""
    if stem in STEMS:
        return run_flat(stem, *flat, backend)
    return getattr(named(backend).operators, stem)(*flat)


def flat_arguments(stem: str, *args: Any) -> list[Any]:
    """Return the arguments of a backend's function as the flat list of the operator's schema."""
    flat: list[Any] = []
    for argument in args:
        flat += argument if isinstance(argument, tuple) else [argument]
    if stem == "kron_step":  # the schema separates the fields of a preconditioner
        (weights, (factor_c, factor_k, cached, ok), gathered, lr, draws, found_inf, options) = args
        flat = [*weights, factor_c, factor_k, *gathered, lr, ok, *draws, found_inf, cached, *options]
    return flat


def operator(stem: str) -> Any:
    """Return an operator of PyTorch's dispatcher. Its last argument is the name of the backend."""
    return getattr(torch.ops.rootfree, stem).default


def through(backend: str) -> Call:
    """Return a function that calls the backend's Python functions."""
    return lambda stem, *flat: call(backend, stem, *flat)


def dispatched(backend: str) -> Call:
    """Return a function that calls operators through the dispatcher, and other functions directly."""

    def run(stem: str, *flat: Any) -> Any:
        return operator(stem)(*flat, backend) if stem in STEMS else call(backend, stem, *flat)

    return run
