"""Count how often a step moves from one source file of the package to another.

    python -m tests.tools.file_changes [--backend eager|cpp] [--verbose]

A reader who follows a step must switch files this often. The step is the second step of IFShampoo, because the first
creates the state. The parameters are an 8 x 6 matrix and a vector of 6 elements.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("rootfree_kernels", "triton_kernels")
BACKENDS = ("eager", "cpp")

Changes = Counter[tuple[str, str]]
"""{(from file, to file): number of moves}."""


@cache
def file_of_package(name: str) -> str:
    """Return the path of a source file in the tree, or an empty string if it is not a file of the package."""
    path = Path(os.path.realpath(name))
    inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path()
    return str(inside) if inside.parts and inside.parts[0] in PACKAGES else ""


def trace(call: Callable[[], Any]) -> list[str]:
    """Run `call`; return the file of the package after every Python call and return, in order."""
    files: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        now = {"call": frame, "return": frame.f_back}.get(event)
        if now is not None:
            files.append(now.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [file for file in map(file_of_package, files) if file]


def changes_in(files: Iterable[str]) -> Changes:
    """Count the pairs of different files that follow each other."""
    return Counter(pair for pair in pairwise(files) if pair[0] != pair[1])


def second_step() -> Changes:
    """Take two steps in this process; return the file changes of the second."""
    import torch

    from rootfree_kernels import IFShampoo

    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 6), (6,))]
    optimizer = IFShampoo(params, lr=0.01, batch_size=4)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return changes_in(trace(optimizer.step))


def changes(backend: str) -> Changes:
    """Return the file changes of a step on a backend, measured in a new process.

    Raises:
        RuntimeError: the process failed.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "ROOTFREE_BACKEND": backend}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).resolve()), "--here"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a step on {backend} failed:\n{done.stderr}")
    return Counter({(start, end): number for start, end, number in json.loads(done.stdout)})


def count(backend: str) -> int:
    """Return the number of file changes in a step on a backend."""
    return changes(backend).total()


def main() -> None:
    """Print the counts, and with --verbose the pairs of files."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.file_changes", description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--here", action="store_true", help="step in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps([[*pair, number] for pair, number in second_step().items()]))
        return
    for backend in [arguments.backend] if arguments.backend else BACKENDS:
        found = changes(backend)
        print(f"{backend}: {found.total()} changes of file")
        for (start, end), number in found.most_common() if arguments.verbose else ():
            print(f"  {number:4}  {start} -> {end}")


if __name__ == "__main__":
    main()
