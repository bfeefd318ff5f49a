"""Build the fake GPU: two libraries that replace the CUDA runtime, cuBLAS and the driver.

runtime.c and driver.c define some of the functions that PyTorch and Triton link against. All others are generated. They
do nothing and return 0, which means success.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ("runtime.c", "driver.c")
RUNTIME, DRIVER = "libfakecuda.so", "libcuda.so.1"

RUNTIME_NAMES = re.compile(r"(?:cuda[A-Z]|__cuda|cublas)\w+")
DRIVER_NAMES = re.compile(r"cu[A-Z]\w+")
LIBRARIES_OF_THEIR_OWN = re.compile(r"cu(?:DNN|FFT|RAND|SPARSE|SOLVER)")
DEFINED = re.compile(r"^[\w *]*?\b\*{0,2}((?:cu|__cuda|fake_gpu)\w+)\(", re.MULTILINE)


def why_not() -> str:
    """Return why the fake GPU cannot be built in this environment, or an empty string."""
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if not _torch_libraries():
        return "this PyTorch is not built for CUDA"
    return "" if _headers() else "the headers of the CUDA runtime are missing: install nvcc or set CUDA_HOME"


def build() -> Path:
    """Build the two libraries if their sources, PyTorch or Triton changed; return their folder."""
    texts = [(HERE / name).read_text() for name in (*SOURCES, "library.py")]
    key = "\n".join([*texts, version("torch"), version("triton")])
    folder = ROOT / "build" / "fake_gpu" / hashlib.sha256(key.encode()).hexdigest()[:12]
    if not (folder / DRIVER).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile_into(folder)
    return folder


def environment(folder: Path, devices: int, caching: bool) -> dict[str, str]:
    """Return the environment variables of a process with `devices` fake GPUs.

    Without PyTorch's caching allocator, every tensor is new memory filled with zeros, and uses of freed memory are
    detected.
    """
    return {
        **({} if caching else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        "ROOTFREE_FAKE_GPU": "1",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # there is no fake cuDNN
        "FAKE_GPU_DEVICES": str(devices),
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
    }


def _compile_into(folder: Path) -> None:
    wanted = _undefined_names()
    generated = {
        "runtime": {name for name in wanted if RUNTIME_NAMES.fullmatch(name)} - _defined("runtime.c"),
        "driver": {name for name in wanted if DRIVER_NAMES.fullmatch(name)} - _defined("driver.c"),
    }
    for part, names in generated.items():
        lines = [f"int {name}(void) {{ return 0; }}" for name in sorted(names)]
        (folder / f"generated_{part}.c").write_text("\n".join(lines) + "\n")
    flags = ["-w", "-shared", "-fPIC", "-O1", f"-I{_headers()}", f"-I{_triton_driver() / 'include'}"]
    _run(*flags, HERE / "runtime.c", folder / "generated_runtime.c", "-o", folder / RUNTIME, "-ldl", "-lpthread")
    part = folder / f"{DRIVER}.part"  # renamed last, so that an existing driver means a complete build
    soname = f"-Wl,-soname,{DRIVER}"
    _run(*flags, soname, HERE / "driver.c", folder / "generated_driver.c", "-o", part)
    part.replace(folder / DRIVER)


def _run(*arguments: object) -> None:
    subprocess.run([*shlex.split(os.environ.get("CC") or "cc"), *map(str, arguments)], check=True)


def _defined(source: str) -> set[str]:
    return set(DEFINED.findall((HERE / source).read_text()))


def _undefined_names() -> set[str]:
    """Return the undefined CUDA symbols of PyTorch's libraries, and the symbols that Triton looks up."""
    output = subprocess.run(
        ["nm", "-D", "--undefined-only", *map(str, _torch_libraries())], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1].partition("@")[0] for line in output.splitlines() if " U " in line}
    names |= set(re.findall(r"\bcu[A-Z]\w+", (_triton_driver() / "driver.c").read_text()))
    return {name for name in names if not name.endswith("_t") and not LIBRARIES_OF_THEIR_OWN.match(name)}


def _torch_libraries() -> list[Path]:
    folder = _torch() / "lib"
    names = (
        "libc10_cuda.so",
        "libtorch_cuda.so",
        "libtorch_cuda_linalg.so",
        "libtorch_python.so",
        "libcaffe2_nvrtc.so",
    )
    return [folder / name for name in names] if (folder / "libtorch_cuda.so").exists() else []


def _torch() -> Path:
    return _folder_of("torch")


def _triton_driver() -> Path:
    return _folder_of("triton") / "backends" / "nvidia"


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _headers() -> Path | None:
    """Return the folder of the CUDA runtime's headers, from PyTorch's packages or from a CUDA toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "include"
    folders = [*_torch().parent.glob("nvidia/cu*/include"), toolkit]
    return next((folder for folder in folders if (folder / "cuda_runtime_api.h").exists()), None)
