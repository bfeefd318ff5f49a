"""Prepare a machine with a GPU and a Python of its own for `make gpu`, without fetching anything.

    python -m bench.gpu_run.machine             say what is missing; install this tree in place unless it is
    python -m bench.gpu_run.machine --ignored   print pytest's arguments that leave out tests of missing packages
    python -m bench.gpu_run.machine --probe     print whether a bundle would fit: versions, Triton's key, one product

The exit status is 1 if PyTorch, Triton, pytest, numpy or the GPU is missing, with a sentence that says so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from bench.common.gpu import why_no_gpu
from bench.common.paths import ROOT

NEEDED = ("torch", "triton", "pytest", "numpy")
OPTIONAL = ("hypothesis", "expecttest", "matplotlib", "rich")
"""Packages that some tests import. Without them these tests are left out."""

INDIRECTLY = {
    "bench.demo.__main__": ("matplotlib", "rich"),
    "tests.triton.kron_batches": ("hypothesis",),
    "tests.cpp.kron_batches": ("hypothesis",),
}
"""Modules that tests import, and the optional packages that these import."""

BUILD = ("pip", "setuptools")
MIN_SETUPTOOLS = 77
"""As in pyproject.toml, whose licence entry earlier versions refuse."""

IMPORTED = """
import sys
from pathlib import Path
import rootfree_kernels.triton_kernels as kernels
print(Path(kernels.__file__).resolve().parent)
"""


def missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if find_spec(name) is None]


def problem() -> str | None:
    """Return why nothing can be run on this machine, or None."""
    if absent := missing(NEEDED):
        return f"{sys.executable} has no {', '.join(absent)}: choose another one (PYTHON=python3.12 make gpu)."
    return f"{sys.executable}: {why}." if (why := why_no_gpu()) else None


def triton_folder() -> str:
    """Return the folder of the installed rootfree_kernels.triton_kernels, "" if there is none.

    This tree by itself does not count: its extension may not have been built.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", IMPORTED]
    run = subprocess.run(command, cwd=ROOT.anchor, env=environment, capture_output=True, text=True)
    return run.stdout.strip().rpartition("\n")[2] if run.returncode == 0 else ""


def install() -> str | None:
    """Install this tree in place, editable. Return why that failed, or None."""
    wanted = str(ROOT / "triton_kernels")
    if triton_folder() == wanted:
        return None
    if absent := missing(BUILD):
        return f"{sys.executable} has no {', '.join(absent)} to install this tree with."
    setuptools = version("setuptools")
    if int(setuptools.partition(".")[0]) < MIN_SETUPTOOLS:
        return f"setuptools {setuptools} cannot install this tree: it needs {MIN_SETUPTOOLS} or later."
    options = ["--disable-pip-version-check", "--quiet", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    command = [sys.executable, "-m", "pip", *options, "-e", str(ROOT)]
    print("installing rootfree-kernels, editable, with what is there ...", flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        return f"{' '.join(command)} failed."
    if (found := triton_folder()) != wanted:
        return f"rootfree_kernels.triton_kernels comes from {found or 'nowhere'} after the install, not from {ROOT}."
    return None


def ignored() -> list[Path]:
    """Return the tests that import a missing package, by themselves or through a module of `INDIRECTLY`."""
    absent = missing(OPTIONAL)
    absent += [module for module, packages in INDIRECTLY.items() if {*packages} & {*absent}]
    pattern = re.compile(rf"^\s*(?:import|from) (?:{'|'.join(map(re.escape, absent))})\b", re.MULTILINE)
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path.relative_to(ROOT) for path in files if absent and pattern.search(path.read_text(encoding="utf-8"))]


def probe() -> str:
    """Return one line: versions, Triton's key, and the norm of a product on the GPU."""
    import torch

    from bench.gpu_run.bundle import versions

    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    found = ", ".join(f"{name} {value}" for name, value in versions().items())
    return f"{found}; norm of a product {(x @ x).float().norm().item():.0f}"


def main() -> int:
    """Prepare the machine, or print what was asked for, and return the exit status."""
    if sys.argv[1:] == ["--ignored"]:
        print(" ".join(f"--ignore={path}" for path in ignored()))
        return 0
    if sys.argv[1:] == ["--probe"]:
        print(probe())
        return 0
    if reason := problem() or install():
        print(f"✗ make gpu: {reason}")
        return 1
    if absent := missing(OPTIONAL):
        left_out = ", ".join(map(str, ignored())) or "no test"
        print(f"without {', '.join(absent)}, {left_out} is left out")
    subprocess.run([sys.executable, "-m", "rootfree_kernels"], cwd=ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
