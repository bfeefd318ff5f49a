"""`python -m rootfree_kernels`: print what is installed, which backend serves which device and dtype, and why."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform

import torch

import rootfree_kernels
from rootfree_kernels.eager import EAGER
from rootfree_kernels.eager.cpu_products import probe
from rootfree_kernels.native import build_record
from rootfree_kernels.ops import dispatch
from rootfree_kernels.ops.backends import DTYPES, NAMES, choose, why_not


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[torch.device, str]]:
    """Return (device, description) of the CPU and of every GPU that torch can see."""
    threads = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    devices = [(torch.device("cpu"), f"{platform.processor() or platform.machine()}, {threads}")]
    for index in range(torch.cuda.device_count()):
        devices.append((torch.device("cuda", index), torch.cuda.get_device_name(index)))
    return devices


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _extension(built: bool) -> str:
    if not built:
        return "left out"
    try:
        info = importlib.import_module("rootfree_kernels._C").build_info()
    except ImportError as error:
        return f"BROKEN, reinstall the package: {error}"
    return ", ".join(f"{name} {value}" for name, value in info.items())


def _versions() -> list[str]:
    record = build_record()
    lines = [
        f"rootfree-kernels {rootfree_kernels.__version__}",
        f"python {platform.python_version()}, torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), "
        f"triton {_version('triton')}",
        f"compiled extension: {_extension(record['extension'])}",
    ]
    lines += [f"  {part}: {reason}" for part, reason in record["left_out"].items() if reason]
    variables = ("ROOTFREE_BACKEND", "ROOTFREE_DISPATCH")
    return lines + [f"{name}={os.environ[name]}" for name in variables if os.environ.get(name)]


def _table(device: torch.device) -> str:
    try:
        return dispatch.describe(device)
    except dispatch.DispatchTableError as error:
        return f"BROKEN: {error}"


def _serving(device: torch.device, description: str) -> list[str]:
    lines = [f"{device}: {description}"]
    for dtype in DTYPES:
        try:
            lines.append(f"  {_short(dtype):9} {choose(device, dtype).name}")
        except (RuntimeError, ImportError) as error:
            lines.append(f"  {_short(dtype):9} nothing: {error}")
    for name in NAMES:
        try:
            reason = why_not(name, device, torch.float32)
        except ImportError as error:
            reason = str(error)
        if reason:
            lines.append(f"  not {name}: {reason}")
    lines.append(f"  dispatch table: {_table(device)}")
    measured = f": {probe()}" if device.type == "cpu" else ""
    lines.append(f"  bfloat16 factors are multiplied in {_short(EAGER.matmul_dtype(torch.bfloat16, device))}{measured}")
    return lines


def main() -> None:
    """Print the report. It never fails if the package can be imported."""
    lines = _versions()
    for device, description in _devices():
        lines += ["", *_serving(device, description)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
