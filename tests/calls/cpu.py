"""Helpers for tests of the C++ kernels: a skip mark, numbers of threads and instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rootfree_kernels.native import build_record

ROOT = Path(__file__).resolve().parents[2]

LEFT_OUT = build_record()["left_out"]["cpp"]
needs_cpp = pytest.mark.skipif(bool(LEFT_OUT), reason=f"the extension was not built: {LEFT_OUT}")
"""Skip a test if the extension was not built. An extension that was built but does not load is an error."""


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Set the number of PyTorch's threads inside a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def under_other_instruction_sets(module: str, expression: str) -> dict[str, str]:
    """Evaluate an expression of a module under every instruction set except the current one; return values by set."""
    names = {"DEFAULT": True, "AVX2": torch.cpu._is_avx2_supported(), "AVX512": torch.cpu._is_avx512_supported()}
    here = torch.backends.cpu.get_cpu_capability()
    program = f"import torch, {module} as m; print(torch.backends.cpu.get_cpu_capability(), m.{expression})"
    # The repository comes last, so that a build of the package in PYTHONPATH has precedence.
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    runs = []
    for name in [name for name, is_there in names.items() if is_there and name != here]:
        environment = {**os.environ, "PYTHONPATH": path, "ATEN_CPU_CAPABILITY": name.lower()}
        runs.append(subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE))
    outputs = [run.communicate()[0].decode().split() for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs)
    return dict(outputs)
