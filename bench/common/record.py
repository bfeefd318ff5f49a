"""What every record of a measurement says about where it comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from rootfree_kernels.ops.dispatch import device_name, processor
from rootfree_kernels.ops.dispatch import slug as slug


def write_json(path: Path, record: Any) -> None:
    """Write a record, whole or not at all, and make its folder if there is none."""
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def commit() -> str:
    """The commit of this checkout, with a plus sign where files differ from it. Outside one, what ROOTFREE_COMMIT says,
    for a copy of a checkout without its .git; else "unknown"."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ROOTFREE_COMMIT") or "unknown"


def provenance(command: str) -> dict[str, Any]:
    """The command, date, commit, machine and versions of a record."""
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
    """Name, driver and sizes of a GPU, and the versions of what makes kernels for it; of a CPU its name."""
    versions = {"cuda": torch.version.cuda or torch.version.hip, "triton": version_of("triton")}
    name = device_name(device)
    if device.type != "cuda":
        return {"device": name, "driver": None, **versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": name,
        "driver": driver(),
        **versions,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": getattr(properties, "L2_cache_size", None),
        "nvidia_smi": nvidia_smi("clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu"),
    }


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def nvidia_smi(fields: str) -> str:
    """What nvidia-smi says of the first GPU, "" where it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def driver() -> str:
    """The version of the GPU's driver."""
    if version := nvidia_smi("driver_version").strip():
        return version
    loaded = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", loaded.read_text()) if loaded.exists() else None
    return found[0] if found else "unknown"
