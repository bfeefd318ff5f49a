"""Ranges for profilers: which step, batch and phase a launch belongs to.

    IFShampoo.step
        36 blocks of 768x1024
            gather, factor update (in a step that has one), precondition, apply
        diagonal step of 98 tensors
            apply

Nsight Systems and Nsight Compute get them through NVTX, PyTorch's profilers by `record_function`; these go first, since
under `emit_nvtx` theirs become NVTX ranges. Where nobody listens there are none: a step asks once, and what is marked
within it looks at one flag. Steps that `torch.compile` traced have none either, and a replayed CUDA graph has those of
its capture only, which record nothing in it.

A range ends where the next one of its level or of the level above begins, or with the step, by an exception too. One
that begins in an operator is ended there, since profilers have a range of their own around operators.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.autograd import profiler

Close = Callable[[], Any]

_BATCH, _PHASE = 1, 2  # how many ranges lie around one of the level

_nvtx: Any = torch.cuda.nvtx if torch.version.cuda and hasattr(torch._C, "_nvtx") else None
"""None where PyTorch was built without; for AMD's GPUs too, whose roctx takes every range, listened to or not."""

_injected = bool(os.environ.get("NVTX_INJECTION64_PATH"))
"""Whether a tool has NVTX load its library, as nsys and ncu do. One that does not count levels returns -2 as well."""

listened = False
"""Whether somebody listened to the last step that began."""


class _Step(AbstractContextManager[None]):
    """The ranges of a step that are open, outermost first, by what closes them."""

    def __init__(self, begin: Callable[[str], Close], close: Close) -> None:
        self.begin, self.open = begin, [close]

    def mark(self, level: int, name: str) -> None:
        self.close(level)
        self.open.append(self.begin(name))

    def close(self, level: int = 0) -> None:
        while len(self.open) > level:
            self.open.pop()()

    def __enter__(self) -> None:
        self.outer, _thread.step = _thread.step, self

    def __exit__(self, *error: object) -> None:
        _thread.step = self.outer
        self.close()


class _Thread(threading.local):
    step: _Step | None = None


_thread = _Thread()
_UNHEARD = nullcontext()


def step(name: str) -> AbstractContextManager[None]:
    """The context of a step, around which there is a range of this name, if anybody listens."""
    global listened
    opened = _opened(name)
    listened = opened is not None
    return opened or _UNHEARD


def batch(name: str) -> None:
    """From here on the step works on another batch."""
    if listened and _thread.step is not None:
        _thread.step.mark(_BATCH, name)


def end_batch() -> None:
    """From here on the step works on no batch."""
    if listened and _thread.step is not None:
        _thread.step.close(_BATCH)


def phase(name: str) -> None:
    """From here on another phase of the batch runs. Nothing where an operator is called by itself, without a step."""
    if listened and _thread.step is not None:
        _thread.step.mark(_PHASE, name)


def end_phase() -> None:
    """From here on no phase runs."""
    if listened and _thread.step is not None:
        _thread.step.close(_PHASE)


def _opened(name: str) -> _Step | None:
    if profiler._is_profiler_enabled:
        return _Step(_record, _record(name))
    if _nvtx is None:
        return None
    heard = _nvtx.range_push(name) >= 0 or _injected
    return _Step(_push, _nvtx.range_pop) if heard else None


def _record(name: str) -> Close:
    context = profiler.record_function(name)
    context.__enter__()
    return partial(context.__exit__, None, None, None)


def _push(name: str) -> Close:
    _nvtx.range_push(name)
    return _nvtx.range_pop
