"""Fill new memory with NaN, and define fixtures for the kernels on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from tests.calls.operators import Call, through
from tests.calls.uninitialized import new_memory_is_nan
from tests.cuda.on_cpu.library import CudaOnCpu, build, why_not


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    with new_memory_is_nan():
        yield


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> CudaOnCpu:
    """Return the kernels compiled for the CPU."""
    if reason := why_not():
        pytest.skip(reason)
    return CudaOnCpu(build(tmp_path_factory.mktemp("cuda_on_cpu")))


@pytest.fixture(scope="module")
def on_gpu() -> Call:
    """Return a function that calls the CUDA backend on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that PyTorch can use")
    try:
        import_module("rootfree_kernels._C")
        served = torch._C._dispatch_has_kernel_for_dispatch_key("rootfree_native::rf_rmsprop_table", "CUDA")
    except (ImportError, RuntimeError):
        served = False
    if not served:
        pytest.skip("the extension was built without its CUDA part; `python -m rootfree_kernels` says why")
    return through("cuda")
