"""Replacements for functions of backends, and a record of launched kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rootfree_kernels.arguments import Gathered
from rootfree_kernels.backend import Backend
from rootfree_kernels.ops.backends import named
from tests.calls.operators import flat_arguments


def idle_functions() -> dict[str, Callable[..., Any]]:
    """Return functions of a backend that compute nothing and return cached tensors."""
    outputs: dict[Any, Any] = {}

    def kron_gather(*args: Any) -> Gathered:
        _, tiles, rows, cols, *_ = flat_arguments("kron_gather", *args)
        blocks = sum(down * across for down, across in zip(tiles[1::4], tiles[3::4], strict=True))
        shape = blocks, rows, cols
        if shape not in outputs:
            outputs[shape] = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(3, blocks, 1)
        grad, squares = outputs[shape]
        return Gathered(grad.detach(), squares.detach())  # an operator must return new tensors

    def kron_factor(*args: Any) -> Tensor:
        num_blocks = len(flat_arguments("kron_factor", *args)[0])
        if num_blocks not in outputs:
            outputs[num_blocks] = torch.ones(num_blocks, dtype=torch.bool)
        return outputs[num_blocks].detach()

    def nothing(*args: Any) -> None:
        return None

    return {
        "rf_rmsprop": nothing,
        "kron_gather": kron_gather,
        "kron_factor": kron_factor,
        "kron_step": nothing,
        "kron_products": lambda c, k, dtype: (c.to(dtype).clone(), k.to(dtype).clone()),
        "num_partial_sums": lambda rows, cols: 1,
        "padded_side": lambda size: size,
    }


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """Replace these functions of a backend; keep its other functions."""
    backend = named(name)
    monkeypatch.setitem(vars(backend), "operators", SimpleNamespace(**{**vars(backend.operators), **functions}))


def functions_of(name: str, *stems: str) -> dict[str, Callable[..., Any]]:
    """Return functions of a backend by name."""
    return {stem: getattr(named(name).operators, stem) for stem in stems}


def forget_import(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """Make a backend import its module again, both now and after the test."""
    for name in ("import_problem", "operators"):
        monkeypatch.setitem(vars(backend), name, None)
        del vars(backend)[name]


def modules_that_launch() -> list[Any]:
    """Return the modules of Triton kernels that start kernels with `launch`."""
    from rootfree_kernels import triton_kernels

    found = [x for name, x in [*sys.modules.items()] if name.startswith(f"{triton_kernels.__name__}.")]
    return [x for x in found if hasattr(x, "launch") and x.__name__ != f"{triton_kernels.__name__}.launch"]


@contextmanager
def noted_launches() -> Iterator[list[str]]:
    """Record the names of launched Triton kernels, and "bmm" for each `torch.bmm`, in order."""
    names: list[str] = []

    def noted(function: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            names.append(name_of(*args))
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module in modules_that_launch():
            patch.setattr(module, "launch", noted(module.launch, lambda kernel, *args: kernel.__name__))
        patch.setattr(torch, "bmm", noted(torch.bmm, lambda *args: "bmm"))
        yield names
