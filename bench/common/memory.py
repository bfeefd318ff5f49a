"""Bytes that an optimizer keeps between steps, and bytes that its steps take on the way."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MemberDescriptorType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity

LEAVES = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, type, ModuleType)
CONTAINERS = (list, tuple, set, frozenset, deque)


def tensors_of(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object: through containers, attributes and slots, closures left out."""
    seen = set() if seen is None else seen
    if isinstance(thing, LEAVES) or id(thing) in seen or (callable(thing) and not hasattr(thing, "__dict__")):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    for part in _parts(thing):
        yield from tensors_of(part, seen)


def _parts(thing: Any) -> Iterable[Any]:
    """What an object holds: items, attributes and slots."""
    items = [*thing.keys(), *thing.values()] if isinstance(thing, dict) else thing
    items = [*items] if isinstance(items, CONTAINERS) else []
    slots = [getattr(thing, name, None) for kind in type(thing).__mro__ for name in _slots(kind)]
    return [*items, *getattr(thing, "__dict__", {}).values(), *slots]


def _slots(kind: type) -> list[str]:
    """The names of the slots that a class itself adds, private ones as they are in it."""
    if "__slots__" not in vars(kind):
        return []
    return [name for name, value in vars(kind).items() if isinstance(value, MemberDescriptorType)]


def storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the memory behind tensors by its address: views of one memory count once."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.layout == torch.strided}


def state_bytes(optimizer: Optimizer, params: Iterable[Tensor]) -> int:
    """Bytes of all tensors that an optimizer holds, wherever it holds them, without weights and gradients."""
    theirs = storage_bytes(x for param in params for x in (param, param.grad) if x is not None)
    memory = storage_bytes(tensors_of([dict(optimizer.state), vars(optimizer)]))
    return sum(bytes_ for address, bytes_ in memory.items() if address not in theirs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that the profiler's library writes to the standard error whenever it begins and ends."""
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
    """The most memory that PyTorch's allocator had given out while `run` ran, above what it had before."""
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
