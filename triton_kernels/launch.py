"""Launching: tables of addresses that stay on the device, and launches that skip Triton's argument binder.

A kernel takes a list of tensors as a table of addresses and sizes in device memory. A table is copied there once and
kept by its content: it is made anew when an address changes (which is seen by `data_ptr`), and only then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import Parameter, signature
from typing import Any

import torch
import triton
from torch import Tensor

MAX_TABLES = 512
"""Tables kept on the devices. Gradients whose addresses change from step to step use up a few of them."""

_tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
_captured: list[Tensor] = []  # of tables that were copied within a CUDA graph: a replay copies them again
_compiled: dict[tuple[Any, ...], Any] = {}


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` of a kernel whose numbers are arguments of the run: none of their values is compiled in."""
    names = [name for name, parameter in signature(function).parameters.items() if not _is_constant(parameter)]
    numbers = [name for name in names if not name.endswith(("_ptr", "_table"))]
    return triton.jit(function, do_not_specialize=numbers)


def _is_constant(parameter: Parameter) -> bool:
    return "constexpr" in str(parameter.annotation)


def table(rows: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers as an int64 tensor on `device`, kept there by content."""
    key = (tuple(rows), device)
    kept = _tables.get(key)
    if kept is not None:
        _tables.move_to_end(key)
        return kept
    host = torch.tensor(key[0], dtype=torch.int64)
    if device.type != "cuda":
        kept = host.to(device)
    else:
        host = host.pin_memory()
        kept = host.to(device, non_blocking=True)
        if torch.cuda.is_current_stream_capturing():  # not filled before a replay, which reads `host` every time
            _captured.extend((host, kept))
            return kept
    _tables[key] = kept
    if len(_tables) > MAX_TABLES:
        _tables.popitem(last=False)
    return kept


def launch(
    kernel: Any, grid: int, args: tuple[Any, ...], constants: tuple[Any, ...], num_warps: int = 4, num_stages: int = 1
) -> None:
    """Run `kernel` on `grid` programs; `constants` are its `tl.constexpr` parameters, which stand last, in order.

    The first launch of a kind goes through Triton, which compiles; the later ones go straight to the compiled kernel,
    which saves most of a launch's time on the host. A kind is: constants, dtypes and alignment of the tensors, no
    number among `args`: kernels are declared with `kernel`, so that a changing learning rate never compiles anything.
    """
    if grid == 0:
        return
    tensors = [x for x in args if isinstance(x, Tensor)]
    device = tensors[0].device
    kind = tuple([(x.dtype, x.data_ptr() % 16 == 0) for x in tensors])
    key = (kernel, device, kind, constants, num_warps, num_stages)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if compiled := _compiled.get(key):
            compiled[(grid, 1, 1)](*args, *constants)
            return
        names = kernel.arg_names[len(args) :]
        meta = dict(zip(names, constants, strict=True))
        _compiled[key] = kernel[(grid,)](*args, **meta, num_warps=num_warps, num_stages=num_stages)


def num_compilations() -> int:
    """How many kinds of launches there were: each was compiled, or found compiled in Triton's cache, once."""
    return len(_compiled)
