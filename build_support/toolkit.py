"""Find the CUDA toolkit to build with."""

import os
import re
import shutil
import subprocess
from pathlib import Path


def is_toolkit(folder):
    """Return whether a folder has the compiler and the headers that a build needs."""
    return (folder / "bin/nvcc").is_file() and (folder / "include/cuda_runtime_api.h").is_file()


def toolkit_of(nvcc):
    """Return the toolkit that an nvcc belongs to, or None. The nvcc may be a script that calls another one."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^#\$ _HERE_=(.+)$", output, re.MULTILINE)
    return Path(found[1].strip()).parent if found else None


def find_toolkit(usual=Path("/usr/local/cuda")):
    """Return (folder, None), or (None, reason) if there is no toolkit.

    The first candidates are those of PyTorch. PyTorch accepts the folder above the nvcc on the PATH even if it has no
    headers, which fails if that nvcc is a script. Such an nvcc is asked where its toolkit is.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    candidates = [Path(named)] if named else []
    candidates += [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]] if nvcc else []
    if not any(map(is_toolkit, candidates)):
        candidates += [folder for folder in (nvcc and toolkit_of(nvcc), usual) if folder and folder.exists()]
    if found := next(filter(is_toolkit, candidates), None):
        return found, None
    if not candidates:
        return None, "no CUDA toolkit: set CUDA_HOME or put nvcc on the PATH"
    where = ", ".join(map(str, dict.fromkeys(candidates)))
    return None, f"no CUDA toolkit: not both bin/nvcc and include/cuda_runtime_api.h in {where}; set CUDA_HOME"
