"""Bytes that an optimizer keeps between steps, bytes that its steps allocate, and memory that is kept or released."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity

CODE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
"""Objects whose references are those of a program and not those of an optimizer."""


def tensors_of(thing: Any) -> Iterator[Tensor]:
    """Yield every tensor that can be reached from an object, through containers, attributes and slots."""
    seen: set[int] = set()
    waiting = [thing]
    while waiting:
        found = waiting.pop()
        if isinstance(found, CODE) or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield found
        else:
            waiting += gc.get_referents(found)


def storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of the memory behind tensors by its address, so that views of one memory count once."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.layout == torch.strided}


def state_bytes(optimizer: Optimizer, params: Iterable[Tensor]) -> int:
    """Return the bytes of all tensors that an optimizer holds anywhere, without weights and gradients."""
    theirs = storage_bytes(x for param in params for x in (param, param.grad) if x is not None)
    memory = storage_bytes(tensors_of([dict(optimizer.state), vars(optimizer)]))
    return sum(bytes_ for address, bytes_ in memory.items() if address not in theirs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard the lines that the profiler's library writes to the standard error when it begins and ends."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the most memory that PyTorch's allocator had given out while `run` ran, above what it had before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def release() -> None:
    """Give unused memory back, of Python and of a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def settle_allocator() -> None:
    """Allocate and free a large tensor, as any training does.

    The C library then keeps memory of this size. Otherwise it would return it to the system after every step, and page
    faults would be timed.
    """
    torch.zeros(7 << 20)
