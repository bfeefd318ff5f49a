"""A pytest plugin for a machine with a GPU: pytest -p bench.gpu_run.pytest_plugin

- Hypothesis does not shrink examples, which takes minutes there, and draws the same ones each time.
- After a CUDA error nothing else of the process can be trusted. With pytest-xdist the process ends and another one goes
  on with the tests that are left; the failure is written to ROOTFREE_CUDA_ERRORS first.
- The names of failed tests are written to ROOTFREE_FAILED as they come.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    import hypothesis
except ImportError:  # the tests that need it are left out
    pass
else:
    hypothesis.settings.register_profile(
        "gpu_run",
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("gpu_run")  # before tests are imported, whose own settings build on it

CUDA_ERRORS = ("CUDA error", "Triton Error [CUDA]")


def spoils_the_context(error: BaseException | None) -> bool:
    """Return whether an error leaves a CUDA context in which nothing works any more."""
    return error is not None and any(text in str(error) for text in CUDA_ERRORS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.excinfo is not None and spoils_the_context(call.excinfo.value):
        _append("ROOTFREE_CUDA_ERRORS", f"{item.nodeid}\n{call.excinfo.getrepr(style='short')}\n")
        if os.environ.get("PYTEST_XDIST_WORKER"):
            sys.stderr.flush()
            os._exit(3)
    return report


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed and not os.environ.get("PYTEST_XDIST_WORKER"):
        _append("ROOTFREE_FAILED", report.nodeid)


def _append(variable: str, text: str) -> None:
    if path := os.environ.get(variable):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
