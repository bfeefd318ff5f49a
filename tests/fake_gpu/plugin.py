"""A pytest plugin for tests on the fake GPU (see `__main__.py`): pytest -p tests.fake_gpu.plugin

Kernels compute nothing on the fake GPU, so tests that compare values fail. The plugin reports these failures as
expected failures. A test fails if it raises another exception or makes an error that a GPU would report:

- a launch with freed memory or with a tensor on another device, as an argument or in a table,
- a launch with too many threads or too much shared memory,
- a synchronization or a copy from pageable memory during the capture of a CUDA graph.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import hypothesis
import pytest
import torch

from tests.fake_gpu import library

MAX_REPORTED = 3
SMALLEST_ADDRESS = 1 << 32  # smaller integers in a table are sizes and strides

hypothesis.settings.register_profile(
    "fake_gpu",
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    max_examples=2,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("fake_gpu")


class FakeGpu:
    """Counters of the fake GPU in this process."""

    def __init__(self) -> None:
        self.library: Any = ctypes.CDLL(library.RUNTIME)
        for name in ("launches", "synchronizations", "problems"):
            getattr(self.library, f"fake_gpu_{name}").restype = ctypes.c_long
        self.library.fake_gpu_last_problem.restype = ctypes.c_char_p
        self.library.fake_gpu_device_of.argtypes = [ctypes.c_void_p]
        self.wrong_launches: list[str] = []

    def launches(self) -> int:
        """Return the number of launched kernels."""
        return int(self.library.fake_gpu_launches())

    def synchronizations(self) -> int:
        """Return the number of times the host waited for the device."""
        return int(self.library.fake_gpu_synchronizations())

    def problems(self) -> list[str]:
        """Return the errors so far that a GPU would report. Of the libraries' errors, only the last has a message."""
        count = int(self.library.fake_gpu_problems())
        last = self.library.fake_gpu_last_problem().decode()
        return [*self.wrong_launches, *([f"{count} problems, the last: {last}"] if count else [])]

    def forget_problems(self) -> list[str]:
        """Return `problems()` and reset them."""
        found = self.problems()
        self.library.fake_gpu_forget_problems()
        self.wrong_launches.clear()
        return found

    def check_launch(self, kernel: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        """Record an error if a tensor of a launch, or memory in one of its tables, is on another device or freed."""
        device = torch.cuda.current_device()
        for x in tensors:
            if x.device != torch.device("cuda", device):
                self.wrong_launches.append(f"{kernel.__name__} on device {device} gets a tensor on {x.device}")
        for x in tensors:
            if x.dtype == torch.int64 and x.ndim:
                self._check_table(kernel.__name__, x, device)

    def _check_table(self, name: str, table: torch.Tensor, device: int) -> None:
        numbers = (ctypes.c_int64 * table.numel()).from_address(table.data_ptr())
        for number in numbers:
            if number >= SMALLEST_ADDRESS and (found := self.library.fake_gpu_device_of(number)) != device:
                where = {-1: "the host's memory", -2: "freed memory"}.get(found, f"memory of device {found}")
                self.wrong_launches.append(f"a table of {name} on device {device} names {where}")
                return


fake = FakeGpu()


def checked(launch: Callable[..., None]) -> Callable[..., None]:
    """Return a `launch` function that also checks the tensors of every launch."""

    @wraps(launch)
    def call(kernel: Any, grid: int, tensors: tuple[torch.Tensor, ...], *rest: Any) -> None:
        launch(kernel, grid, tensors, *rest)
        if grid and tensors[0].is_cuda and not torch.cuda.is_current_stream_capturing():
            with torch.cuda.device(tensors[0].device):
                fake.check_launch(kernel, tensors)

    return call


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.environ.get("ROOTFREE_FAKE_GPU") != "1":
        raise pytest.UsageError("this plugin needs the fake GPU: python tests/fake_gpu python -m pytest ...")
    import rootfree_kernels.triton_kernels as kernels

    for name, module in [*sys.modules.items()]:
        if name.startswith(f"{kernels.__name__}.") and hasattr(module, "launch"):
            module.launch = checked(module.launch)  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    fake.forget_problems()
    try:
        return (yield)
    finally:
        item.stash[PROBLEMS] = fake.forget_problems()[:MAX_REPORTED]


PROBLEMS = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if call.when != "call":
        return report
    if problems := item.stash.get(PROBLEMS, []):
        report.outcome, report.longrepr = "failed", "\n".join(["a GPU would refuse this:", *problems])
    elif report.failed and call.excinfo is not None and is_about_values(call.excinfo.value):
        report.outcome, report.wasxfail = "skipped", "the fake GPU computes nothing"
    return report


def is_about_values(error: BaseException) -> bool:
    """Return whether a failure may be caused only by wrong values."""
    if errors := getattr(error, "exceptions", ()):  # Hypothesis raises exception groups
        return all(map(is_about_values, errors))
    if type(error).__name__ == "OpCheckError":  # opcheck compares copies, which the fake GPU does not make
        return any(text in str(error) for text in ("was mutated", "are different"))
    return isinstance(error, AssertionError) or type(error).__name__ == "CheckFailed"
