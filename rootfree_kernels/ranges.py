"""Ranges for profilers: they show which step, batch and phase a launch belongs to.

    IFShampoo.step
        36 blocks of 768x1024
            gather, factor update (in a step that has one), precondition, apply
        diagonal step of 98 tensors
            apply

Nsight Systems and Nsight Compute receive them through NVTX, PyTorch's profilers through `record_function`. A PyTorch
profiler has precedence, because `emit_nvtx` turns its ranges into NVTX ranges. Without a profiler no range is opened: a
step asks once, and every mark within it tests one flag. Steps that `torch.compile` traced have no ranges, and neither
has the replay of a CUDA graph.

A range ends where the next one of its level, or of the level above, begins. It also ends with the step, even if that
raises. A range that begins in an operator must end there, because profilers put a range of their own around operators.
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

_BATCH, _PHASE = 1, 2  # the number of ranges around a range of this level

_nvtx: Any = torch.cuda.nvtx if torch.version.cuda and hasattr(torch._C, "_nvtx") else None
"""None if PyTorch was built without NVTX, and on AMD's GPUs: roctx takes every range, with or without a profiler."""

_injected = bool(os.environ.get("NVTX_INJECTION64_PATH"))
"""Whether a tool makes NVTX load its library, as nsys and ncu do. Some return -2 from `range_push`, as if absent."""

listened = False
"""Whether a profiler was attached when the last step began."""


class _Step(AbstractContextManager[None]):
    """The open ranges of a step, outermost first, as the functions that close them."""

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
    """Return the context of a step. It opens a range of this name if a profiler is attached."""
    global listened
    opened = _opened(name)
    listened = opened is not None
    return opened or _UNHEARD


def batch(name: str) -> None:
    """Begin the range of the next batch."""
    if listened and _thread.step is not None:
        _thread.step.mark(_BATCH, name)


def end_batch() -> None:
    """End the range of the last batch."""
    if listened and _thread.step is not None:
        _thread.step.close(_BATCH)


def phase(name: str) -> None:
    """Begin the range of the next phase of a batch. An operator that is called without a step opens none."""
    if listened and _thread.step is not None:
        _thread.step.mark(_PHASE, name)


def end_phase() -> None:
    """End the range of the last phase."""
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
