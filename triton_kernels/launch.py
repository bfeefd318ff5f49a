"""Launches that skip Triton's argument binder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import Parameter, signature
from operator import attrgetter
from typing import Any

import torch
import triton
from torch import Tensor


class _Compiled:
    """A compiled kernel, with what a launch needs of it at hand."""

    __slots__ = ("function", "kernel", "metadata", "run")

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.run = kernel, kernel.run
        self.function, self.metadata = kernel.function, kernel.packed_metadata

    def launch(self, grid: int, stream: int, args: tuple[Any, ...]) -> None:
        """Launch as `triton.compiler.CompiledKernel` does, which builds what hooks of a profiler want each time."""
        runtime = triton.knobs.runtime
        if _is_hooked(runtime.launch_enter_hook) or _is_hooked(runtime.launch_exit_hook):
            self.kernel[(grid, 1, 1)](*args)
        else:
            self.run(grid, 1, 1, stream, self.function, self.metadata, None, None, None, *args)


def _is_hooked(hook: Any) -> bool:
    """Return whether a hook, or a chain of hooks, calls anything."""
    return bool(getattr(hook, "calls", hook))


_compiled: dict[tuple[Any, ...], _Compiled | None] = {}
_dtype = attrgetter("dtype")
_NO_CONTEXT = nullcontext()


def kernel(function: Callable[..., Any]) -> Any:
    """Return `triton.jit` of a kernel none of whose numbers is compiled in."""
    names = [name for name, parameter in signature(function).parameters.items() if not _is_constant(parameter)]
    numbers = [name for name in names if not name.endswith(("_ptr", "_table"))]
    return triton.jit(function, do_not_specialize=numbers)


def _is_constant(parameter: Parameter) -> bool:
    return "constexpr" in str(parameter.annotation)


def launch(
    kernel: Any,
    grid: int,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: tuple[Any, ...],
    num_warps: int = 4,
    num_stages: int = 1,
    max_registers: int | None = None,
) -> None:
    """Run `kernel` on `grid` programs, in the current stream of the tensors' device.

    A kernel's parameters are first tensors, then numbers, and `tl.constexpr` last, in the order of these arguments.

    The first launch of a kind goes through Triton, which compiles; the later ones go straight to the compiled kernel,
    which saves most of a launch's time on the host. A kind is the constants and the dtypes of the tensors. No number
    belongs to it (kernels are declared with `kernel`), so that a changing learning rate never compiles anything, and no
    alignment: tensors begin on 16 bytes, or the kernel reads them element by element. `max_registers` bounds the
    registers of a thread on Hopper (compute capability 9).
    """
    if grid == 0:
        return
    device = tensors[0].device
    key = (kernel.fn, constants, tuple(map(_dtype, tensors)), device.index, num_warps, num_stages)
    with _current(device):
        if compiled := _compiled.get(key):
            compiled.launch(grid, torch._C._cuda_getCurrentRawStream(device.index), (*tensors, *numbers, *constants))
            return
        options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if max_registers and _is_hopper(device):
            options["maxnreg"] = max_registers
        args = (*tensors, *numbers)
        named = dict(zip(kernel.arg_names[len(args) :], constants, strict=True))
        made = kernel[(grid,)](*args, **named, **options)
        _compiled[key] = made and _Compiled(made)  # Triton's interpreter makes nothing


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which `device` is the current one; nothing to do where it is."""
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return _NO_CONTEXT
    return torch.cuda.device(device)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def num_compilations() -> int:
    """Return how many kinds of launches there were: each was compiled, or found compiled in Triton's cache, once."""
    return len(_compiled)
