"""Count what an optimizer launches in a step: kernels and copies on a GPU, operators of PyTorch on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rootfree_kernels.ops.operators import run_flat


class OperatorCount(TorchDispatchMode):
    """Count operators of PyTorch and of compiled extensions, without views.

    An operator of this package that is written in Python counts as the operators that it calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rootfree":
            with self:
                return run_flat(func._opname, *args)
        with self:  # inside an operator, one that is made of others arrives whole
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count_launches(run: Callable[[], Any], device: torch.device) -> int:
    """Return how many kernels, copies and fills `run` puts on a GPU, or how many operators it calls on a CPU."""
    if device.type != "cuda":
        with OperatorCount() as operators:
            run()
        return operators.count
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    on_gpu = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.is_user_annotation for event in on_gpu)
