"""Backends are interchangeable, and report unsupported arguments."""

from __future__ import annotations

import inspect

import pytest
import torch

from rootfree_kernels import RFRMSProp, native
from rootfree_kernels import backend as backend_module
from rootfree_kernels.backend import Backend, Operators
from rootfree_kernels.eager import EAGER
from rootfree_kernels.native import CPP, EAGER_WITH_CUDA_MOMENTUM, build_record
from rootfree_kernels.native import CUDA as CUDA_BACKEND
from rootfree_kernels.ops import backends
from rootfree_kernels.triton_kernels import TRITON
from tests.calls.backends import forget_import

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


WITH_MATRICES = [x for x in (*backends.BACKENDS, *TRITON.variants.values()) if x.serves_matrices]
FUNCTIONS = [name for name in vars(Operators) if not name.startswith("_")]
"""Names of the functions that every backend with matrix kernels defines."""


@pytest.mark.parametrize("backend", WITH_MATRICES, ids=lambda backend: backend.name)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_a_backend_have_the_signatures_of_eager_pytorch(name: str, backend: Backend) -> None:
    part = {CPP: "cpp", EAGER_WITH_CUDA_MOMENTUM: "cuda"}.get(backend)
    if part and (reason := build_record()["left_out"][part]):
        pytest.skip(f"it was not built: {reason}")
    ours, theirs = (inspect.signature(getattr(x.operators, name)) for x in (backend, EAGER))
    assert ours == theirs


def test_names_of_backends_are_unique() -> None:
    every = [x for backend in backends.BACKENDS for x in (backend, *backend.variants.values())]
    assert len({backend.name for backend in every}) == len(every)
    assert all(backends.named(backend.name) is backend for backend in every)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine on which Triton compiles for a GPU of the latest generation."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate an extension with the C++ part only."""
    left_out = {"cpp": None, "cuda": "no CUDA toolkit"}
    monkeypatch.setattr(native, "build_record", lambda: {"extension": True, "left_out": left_out})
    monkeypatch.setitem(vars(CPP), "import_problem", None)


@pytest.mark.usefixtures("compiled", "built")
@pytest.mark.parametrize(
    ("device", "dtype", "factors", "expected"),
    [
        (CUDA, FP32, None, "triton"),
        (CUDA, BF16, (BF16, None), "triton"),
        (CUDA, FP32, (BF16, BF16), "triton"),
        (CUDA, FP64, None, "eager"),
        (CUDA, FP32, (FP32, None), "eager_with_triton_momentum"),
        (CUDA, FP32, (BF16, FP32), "eager_with_triton_momentum"),
        (CUDA, FP64, (FP32, None), "eager_with_triton_momentum"),
        (CUDA, FP32, (FP64, None), "eager"),
        (CUDA, FP32, (BF16, FP64), "eager"),
        (CPU, FP32, (BF16, None), "cpp"),
        (CPU, BF16, (FP32, BF16), "cpp"),
        (CPU, FP64, None, "eager"),
        (CPU, FP32, (FP64, None), "eager"),
    ],
    ids=str,
)
def test_default_choice_of_a_backend(device, dtype, factors, expected) -> None:
    assert backends.choose(device, dtype, None, factors).name == expected
    assert backends.choose(device, dtype, False, factors).name == "eager"


@pytest.mark.usefixtures("compiled", "built")
def test_fused_true_says_why_no_kernel_can_run() -> None:
    assert backends.choose(CUDA, FP32, True).name == "triton"
    assert backends.choose(CUDA, FP64, True).name == "eager"  # no backend has kernels for FP64
    with pytest.raises(RuntimeError, match=r"triton: its matrix products are of BF16, not of torch.float32"):
        backends.choose(CUDA, FP32, True, (FP32, None))


@pytest.mark.usefixtures("compiled", "built")
def test_an_old_gpu_uses_eager_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if torch.version.hip:
        pytest.skip("AMD GPUs have other capability numbers")
    assert backends.choose(CUDA, FP32).name == "eager"
    assert "compute capability 8.0" in str(backends.why_not("triton", CUDA, FP32))


@pytest.mark.usefixtures("built")
def test_a_backend_that_cannot_be_imported_is_logged_and_replaced_by_pytorch(monkeypatch, caplog) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    forget_import(monkeypatch, TRITON)
    monkeypatch.setattr(backend_module, "import_module", lambda name: exec("raise ImportError('no triton here')"))
    assert backends.choose(CUDA, FP32).name == "eager"
    assert "no triton here" in str(backends.why_not("triton", CUDA, FP32))
    assert "backend triton cannot be imported" in caplog.text


def test_an_extension_that_was_built_and_is_broken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent fallback would be slow for no visible reason."""
    monkeypatch.setattr(native, "build_record", lambda: {"extension": True, "left_out": {"cpp": None, "cuda": None}})
    forget_import(monkeypatch, CPP)
    monkeypatch.setattr(backend_module, "import_module", lambda name: exec("raise ImportError('undefined symbol')"))
    monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)
    optimizer = RFRMSProp([torch.nn.Parameter(torch.ones(3))], batch_size=1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    with pytest.raises(ImportError, match=r"broken: .*undefined symbol.* Reinstall .* ROOTFREE_BACKEND=eager"):
        optimizer.step()
    monkeypatch.setenv("ROOTFREE_BACKEND", "eager")
    optimizer.step()


def test_without_the_extension_a_cpu_uses_eager_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"extension": False, "left_out": {"cpp": "no C++ compiler", "cuda": "no C++ compiler"}}
    monkeypatch.setattr(native, "build_record", lambda: record)
    monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)
    assert backends.choose(CPU, FP32).name == "eager"
    with pytest.raises(RuntimeError, match=r"fused=True .* cpp: it was not built: no C\+\+ compiler"):
        backends.choose(CPU, FP32, True)


@pytest.mark.usefixtures("compiled", "built")
def test_without_triton_cuda_takes_the_diagonal_step_and_pytorch_the_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(TRITON), "import_problem", "no triton here")
    monkeypatch.setitem(vars(CUDA_BACKEND), "import_problem", None)
    monkeypatch.setattr(native, "build_record", lambda: {"extension": True, "left_out": {"cpp": None, "cuda": None}})
    assert backends.choose(CUDA, FP32).name == "cuda"
    assert backends.choose(CUDA, FP32, None, (BF16, None)).name == "eager_with_cuda_momentum"
    assert backends.choose(CUDA, FP32, None, (FP64, None)).name == "eager"
    assert "no matrix kernels" in str(backends.why_not("cuda", CUDA, FP32, (BF16, None)))
