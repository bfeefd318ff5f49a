"""Count how often execution changes from one file of the package to another in a step.

    python -m tests.tools.file_changes [--backend eager|cpp] [--verbose]

A reader who follows a step through the source turns a page that often. The step is the second one of IFShampoo, since
the first one makes the state, on a matrix of 8 x 6 and a vector of 6.
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
"""How often execution went from one file to another."""


@cache
def file_of_package(name: str) -> str:
    """Return a source file's path within the tree, empty where it is none of the package's."""
    path = Path(os.path.realpath(name))
    inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path()
    return str(inside) if inside.parts and inside.parts[0] in PACKAGES else ""


def trace(call: Callable[[], Any]) -> list[str]:
    """Return the files of the package where execution was, after every call of a Python function and every return."""
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
    """Count the pairs of files that follow each other and differ."""
    return Counter(pair for pair in pairwise(files) if pair[0] != pair[1])


def second_step() -> Changes:
    """Take two steps here, and return the changes of the second."""
    import torch

    from rootfree_kernels import IFShampoo

    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 6), (6,))]
    optimizer = IFShampoo(params, lr=0.01, batch_size=4)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return changes_in(trace(optimizer.step))


def changes(backend: str) -> Changes:
    """Return the changes of a step on a backend, taken in a process of its own.

    Raises:
        RuntimeError: that process failed.
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
    """Return how often execution changes from file to file in a step on a backend."""
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
