"""Backends are interchangeable, and say what they do not serve."""

from __future__ import annotations

import inspect

import pytest
import torch

from rootfree_kernels import RFRMSProp, backends, eager, triton_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize("name", eager.__all__)
def test_a_function_of_a_backend_takes_what_that_of_eager_pytorch_takes(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (eager, triton_kernels))
    assert ours == theirs


def test_every_backend_has_every_function() -> None:
    assert sorted(eager.__all__) == sorted(triton_kernels.__all__)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which Triton compiles for a GPU of the latest generation."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ part of the extension, not the CUDA part."""
    left_out = {"cpp": None, "cuda": "no CUDA toolkit"}
    monkeypatch.setattr(backends, "build_record", lambda: {"extension": True, "left_out": left_out})
    monkeypatch.setitem(backends.BACKENDS, "cpp", eager)


@pytest.mark.usefixtures("compiled", "built")
@pytest.mark.parametrize(
    ("device", "dtype", "factors", "expected"),
    [
        (CUDA, FP32, None, "triton"),
        (CUDA, BF16, (BF16, None), "triton"),
        (CUDA, FP32, (BF16, BF16), "triton"),
        (CUDA, FP64, None, "eager"),
        (CUDA, FP32, (FP32, None), "eager"),
        (CUDA, FP32, (BF16, FP32), "eager"),
        (CPU, FP32, (BF16, None), "cpp"),
        (CPU, BF16, (FP32, BF16), "cpp"),
        (CPU, FP64, None, "eager"),
        (CPU, FP32, (FP64, None), "eager"),
    ],
    ids=str,
)
def test_what_serves_where_nothing_is_asked_for(device, dtype, factors, expected) -> None:
    assert backends.choose(device, dtype, None, factors) == expected
    assert backends.choose(device, dtype, False, factors) == "eager"


@pytest.mark.usefixtures("compiled", "built")
def test_fused_true_says_what_stands_in_the_way() -> None:
    assert backends.choose(CUDA, FP32, True) == "triton"
    with pytest.raises(RuntimeError, match=r"fused=True .* triton: its arithmetic is FP32"):
        backends.choose(CUDA, FP64, True)
    with pytest.raises(RuntimeError, match=r"triton: its matrix products are of BF16, not of torch.float32"):
        backends.choose(CUDA, FP32, True, (FP32, None))


@pytest.mark.usefixtures("compiled", "built")
def test_an_old_gpu_is_served_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if torch.version.hip:
        pytest.skip("AMD's GPUs count otherwise")
    assert backends.choose(CUDA, FP32) == "eager"
    assert "compute capability 8.0" in str(backends.why_not("triton", CUDA, FP32))


@pytest.mark.usefixtures("built")
def test_a_backend_that_cannot_be_imported_says_so_and_pytorch_serves(monkeypatch, caplog) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "import_module", lambda name: exec("raise ImportError('no triton here')"))
    backends._import_problem.cache_clear()
    try:
        assert backends.choose(CUDA, FP32) == "eager"
        assert "no triton here" in str(backends.why_not("triton", CUDA, FP32))
        assert "backend triton cannot be imported" in caplog.text
    finally:
        backends._import_problem.cache_clear()


def test_an_extension_that_was_built_and_is_broken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent fallback would be slow for no visible reason."""
    monkeypatch.setattr(backends, "build_record", lambda: {"extension": True, "left_out": {"cpp": None, "cuda": None}})
    monkeypatch.setattr(backends, "BACKENDS", {"eager": eager})
    monkeypatch.setattr(backends, "import_module", lambda name: exec("raise ImportError('undefined symbol')"))
    monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)
    backends._import_problem.cache_clear()
    optimizer = RFRMSProp([torch.nn.Parameter(torch.ones(3))], batch_size=1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    try:
        with pytest.raises(ImportError, match=r"broken: .*undefined symbol.* Reinstall .* ROOTFREE_BACKEND=eager"):
            optimizer.step()
        monkeypatch.setenv("ROOTFREE_BACKEND", "eager")
        optimizer.step()
    finally:
        backends._import_problem.cache_clear()


def test_an_extension_that_was_left_out_leaves_the_cpu_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"extension": False, "left_out": {"cpp": "no C++ compiler", "cuda": "no C++ compiler"}}
    monkeypatch.setattr(backends, "build_record", lambda: record)
    monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)
    assert backends.choose(CPU, FP32) == "eager"
    with pytest.raises(RuntimeError, match=r"fused=True .* cpp: it was not built: no C\+\+ compiler"):
        backends.choose(CPU, FP32, True)


@pytest.mark.usefixtures("compiled", "built")
def test_without_triton_the_diagonal_step_is_cuda_s_and_matrices_are_pytorch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_import_problem", lambda name: "no triton here" if name == "triton" else None)
    monkeypatch.setattr(backends, "build_record", lambda: {"extension": True, "left_out": {"cpp": None, "cuda": None}})
    assert backends.choose(CUDA, FP32) == "cuda"
    assert backends.choose(CUDA, FP32, None, (BF16, None)) == "eager"
    assert "no matrix kernels" in str(backends.why_not("cuda", CUDA, FP32, (BF16, None)))
