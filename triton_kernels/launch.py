"""Launches of kernels that bypass Triton's argument binder, to save time on the host."""

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
    """A compiled kernel. The attributes that a launch reads are cached."""

    __slots__ = ("function", "kernel", "metadata", "run")

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.run = kernel, kernel.run
        self.function, self.metadata = kernel.function, kernel.packed_metadata

    def launch(self, grid: int, stream: int, args: tuple[Any, ...]) -> None:
        """Launch the kernel. Take Triton's slower way only if a profiler has set hooks, which want its metadata."""
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
    """Return `triton.jit` of a kernel, compiled once for all values of its scalars.

    Every parameter is a pointer (`*_ptr`, `*_table`), a constant (`tl.constexpr`) or a scalar.
    """
    names = [name for name, parameter in signature(function).parameters.items() if not _is_constant(parameter)]
    scalars = [name for name in names if not name.endswith(("_ptr", "_table"))]
    return triton.jit(function, do_not_specialize=scalars)


def _is_constant(parameter: Parameter) -> bool:
    """Return whether a parameter is annotated with `tl.constexpr`."""
    return "constexpr" in str(parameter.annotation)


def launch(
    kernel: Any,
    grid: int,
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    constants: tuple[Any, ...],
    num_warps: int = 4,
    num_stages: int = 1,
    max_registers: int | None = None,
) -> None:
    """Run `kernel` on `grid` programs, in the current stream of the tensors' device.

    Args:
        kernel: the result of `kernel` above. Its parameters are tensors, then scalars, then constants.
        grid: number of programs. With 0, nothing happens.
        tensors: on one device. They begin on a 16-byte boundary, or the kernel reads them element by element.
        scalars: integers and floats.
        constants: values of the `tl.constexpr` parameters, all hashable.
        max_registers: the most registers of a thread on Hopper (compute capability 9). Ignored on other GPUs.

    The first launch with some constants and dtypes goes through Triton, which compiles the kernel. Later ones call the
    compiled kernel directly, which saves most of the time on the host. Values of scalars play no part, so a changing
    learning rate never compiles anything.
    """
    if grid == 0:
        return
    device = tensors[0].device
    key = (kernel.fn, constants, tuple(map(_dtype, tensors)), device.index, num_warps, num_stages)
    with _current(device):
        if compiled := _compiled.get(key):
            compiled.launch(grid, torch._C._cuda_getCurrentRawStream(device.index), (*tensors, *scalars, *constants))
            return
        options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if max_registers and _is_hopper(device):
            options["maxnreg"] = max_registers
        args = (*tensors, *scalars)
        named = dict(zip(kernel.arg_names[len(args) :], constants, strict=True))
        made = kernel[(grid,)](*args, **named, **options)
        _compiled[key] = made and _Compiled(made)  # Triton's interpreter returns None


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which `device` is the current device. It does nothing if it is already."""
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return _NO_CONTEXT
    return torch.cuda.device(device)


def _is_hopper(device: torch.device) -> bool:
    """Return whether a device is an NVIDIA GPU of compute capability 9."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def num_compilations() -> int:
    """Return how many kernels were compiled, or found in Triton's cache, with their constants and dtypes."""
    return len(_compiled)
