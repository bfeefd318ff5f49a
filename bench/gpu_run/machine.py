"""Makes a machine with a GPU and a Python of its own ready for `make gpu`; fetches nothing.

    python -m bench.gpu_run.machine             what is missing; installs this tree in place where it is not installed yet
    python -m bench.gpu_run.machine --ignored   pytest's arguments that leave out tests of which a package is missing

The exit status is 1 where PyTorch, Triton, pytest, numpy or the GPU is missing, with a sentence that says so.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from bench.common.paths import ROOT

NEEDED = ("torch", "triton", "pytest", "numpy")
OPTIONAL = ("hypothesis", "expecttest", "matplotlib", "rich")
"""Packages that some tests import, which are left out without them."""

INDIRECTLY = {
    "bench.demo": ("matplotlib", "rich"),
    "tests.triton.kron_batches": ("hypothesis",),
    "tests.cpp.kron_batches": ("hypothesis",),
}
"""Modules that tests import, and the optional packages that these import."""

BUILD = ("pip", "setuptools")
MIN_SETUPTOOLS = 77
"""As in pyproject.toml, whose licence entry earlier ones refuse."""

IMPORTED = """
import sys
from pathlib import Path
import rootfree_kernels.triton_kernels as kernels
print(Path(kernels.__file__).resolve().parent)
"""


def missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if find_spec(name) is None]


def problem() -> str | None:
    """Why nothing can be run on this machine, or None."""
    if absent := missing(NEEDED):
        return f"{sys.executable} has no {', '.join(absent)}: choose another one (PYTHON=python3.12 make gpu)."
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} of {sys.executable} sees no GPU here."
    return None


def triton_folder() -> str:
    """Return the folder of the installed rootfree_kernels.triton_kernels, "" if there is none.

    This tree by itself does not count: its extension may not have been built.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", IMPORTED]
    run = subprocess.run(command, cwd=ROOT.anchor, env=environment, capture_output=True, text=True)
    return run.stdout.strip().rpartition("\n")[2] if run.returncode == 0 else ""


def install() -> str | None:
    """Install this tree in place, editable; why that failed, or None."""
    if triton_folder() == str(ROOT / "triton_kernels"):
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
    if (found := triton_folder()) != str(ROOT / "triton_kernels"):
        return f"rootfree_kernels.triton_kernels comes from {found or 'nowhere'} after the install, not from {ROOT}."
    return None


def ignored() -> list[Path]:
    """The tests that import a package which is missing, by themselves or through a module of `INDIRECTLY`."""
    absent = missing(OPTIONAL)
    absent += [module for module, packages in INDIRECTLY.items() if {*packages} & {*absent}]
    pattern = re.compile(rf"^\s*(?:import|from) (?:{'|'.join(map(re.escape, absent))})\b", re.MULTILINE)
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path.relative_to(ROOT) for path in files if absent and pattern.search(path.read_text(encoding="utf-8"))]


def main() -> int:
    if sys.argv[1:] == ["--ignored"]:
        print(" ".join(f"--ignore={path}" for path in ignored()))
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
