"""The JSON records of measurements, and what each says about its origin."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.common.paths import ROOT
from rootfree_kernels.ops.dispatch import device_name, processor
from rootfree_kernels.ops.dispatch import slug as slug


def write_json(path: Path, record: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write a record, as `write_text` does. `default` is called with what JSON does not know."""
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False, default=default) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all, and make its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def commit() -> str:
    """Return the commit of this checkout, with a plus sign if files differ from it.

    For a copy without its .git this is $ROOTFREE_COMMIT, or "unknown".
    """
    try:
        return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ROOTFREE_COMMIT") or "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def provenance(command: str) -> dict[str, Any]:
    """Return the command, date, commit, machine and versions of a record."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "processor": f"{processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """Return the name of a device and the versions of CUDA and Triton; of a GPU also its driver, sizes and clocks."""
    versions = {"cuda": torch.version.cuda or torch.version.hip, "triton": _version_of("triton")}
    name = device_name(device)
    if device.type != "cuda":
        return {"device": name, "driver": None, **versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": name,
        "driver": _driver(),
        **versions,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": getattr(properties, "L2_cache_size", None),
        "nvidia_smi": nvidia_smi("clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu"),
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def nvidia_smi(fields: str) -> str:
    """Return these fields of the first GPU as nvidia-smi prints them, "" if it prints none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def _driver() -> str:
    """Return the version of the GPU's driver."""
    if version := nvidia_smi("driver_version").strip():
        return version
    loaded = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", loaded.read_text()) if loaded.exists() else None
    return found[0] if found else "unknown"
