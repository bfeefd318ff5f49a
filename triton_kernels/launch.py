"""Launches that skip Triton's argument binder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from inspect import Parameter, signature
from typing import Any

import torch
import triton
from torch import Tensor

_compiled: dict[tuple[Any, ...], Any] = {}


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` of a kernel whose numbers are arguments of the run: none of their values is compiled in."""
    names = [name for name, parameter in signature(function).parameters.items() if not _is_constant(parameter)]
    numbers = [name for name in names if not name.endswith(("_ptr", "_table"))]
    return triton.jit(function, do_not_specialize=numbers)


def _is_constant(parameter: Parameter) -> bool:
    return "constexpr" in str(parameter.annotation)


def launch(
    kernel: Any,
    grid: int,
    args: tuple[Any, ...],
    constants: tuple[Any, ...],
    num_warps: int = 4,
    num_stages: int = 1,
    max_registers: int | None = None,
) -> None:
    """Run `kernel` on `grid` programs; `constants` are its `tl.constexpr` parameters, which stand last, in order.

    The first launch of a kind goes through Triton, which compiles; the later ones go straight to the compiled kernel,
    which saves most of a launch's time on the host. A kind is: constants and dtypes of tensors, no number among `args`
    (kernels are declared with `kernel`), so that a changing learning rate never compiles anything, and no alignment:
    tensors begin on 16 bytes, or the kernel reads them number by number. The first of `args` is a tensor.
    `max_registers` bounds those of a thread on Hopper (compute capability 9).
    """
    if grid == 0:
        return
    device = args[0].device
    key = (kernel, constants, tuple([x.dtype for x in args if isinstance(x, Tensor)]), device, num_warps, num_stages)
    with _current(device):
        if compiled := _compiled.get(key):
            compiled[(grid, 1, 1)](*args, *constants)
            return
        options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if max_registers and _is_hopper(device):
            options["maxnreg"] = max_registers
        named = dict(zip(kernel.arg_names[len(args) :], constants, strict=True))
        _compiled[key] = kernel[(grid,)](*args, **named, **options)


_NO_CONTEXT = nullcontext()


def _current(device: torch.device) -> Any:
    """A context in which `device` is the current one; nothing to do where it is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(device)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def num_compilations() -> int:
    """How many kinds of launches there were: each was compiled, or found compiled in Triton's cache, once."""
    return len(_compiled)
