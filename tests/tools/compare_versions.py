"""Compare the results of two versions of the package bitwise.

    python -m tests.tools.compare_versions OTHER_TREE [--save FILE] [--backends eager,cpp,triton] [--verbose]
    python -m tests.tools.compare_versions --against FILE

The versions are those of this tree and of OTHER_TREE. Each runs `version_worker` in its own process, once for each
backend. The worker calls operators with flat arguments, trains with all options, resumes from checkpoints of the other
version, and makes mistakes. Triton's kernels run in the interpreter. All resulting tensors are compared by a hash of
their bytes. The exit status is 1 if any tensor differs. Changed error messages are listed separately and are no error.

--save FILE saves the results and checkpoints of OTHER_TREE. --against FILE uses saved results instead of OTHER_TREE.
Results may depend on the machine and on PyTorch, so both are saved, and a difference is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = Path(__file__).resolve().parent / "version_worker"
BACKENDS = ("triton", "eager", "cpp")
"""Backends that run on a CPU. The slowest comes first."""

TIME_LIMIT = 600.0
SHOWN = 8
"""Maximum number of differing entries to list for a case."""

Outcome = dict[str, Any]
"""Results of a version on one backend: `machine`, and either `left_out` or `cases`, `messages` and `checkpoints`."""


def environment(tree: Path, backend: str) -> dict[str, str]:
    """Return the environment variables for a run of a tree's version on a backend."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ROOTFREE_", "TRITON_"))}
    own = {"PYTHONPATH": str(tree), "ROOTFREE_BACKEND": backend, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return {**inherited, **own, **({"TRITON_INTERPRET": "1"} if backend == "triton" else {})}


def work(tree: Path, backend: str, checkpoints: Path | None, output: Path) -> Outcome:
    """Run the worker with a tree's version on a backend; return the outcome.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, str(WORKER), str(output), *(["--checkpoints", str(checkpoints)] if checkpoints else [])]
    done = subprocess.run(
        command, env=environment(tree, backend), cwd=output.parent, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    if done.returncode:
        raise RuntimeError(f"{tree} on {backend} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    outcome: Outcome = json.loads(output.read_text())
    return outcome


def work_of_both(other: Path | Mapping[str, Outcome], backend: str, folder: Path) -> tuple[Outcome, Outcome]:
    """Return the outcomes of the other version and of this tree, which resumes from the other's checkpoints.

    `other` is a tree, or saved outcomes by backend.
    """
    theirs = folder / f"{backend}-other.json"
    if isinstance(other, Path):
        made = work(other, backend, None, theirs)
    else:
        made = other[backend]
        theirs.write_text(json.dumps(made))
    return made, work(ROOT, backend, theirs if "checkpoints" in made else None, folder / f"{backend}-this.json")


# ---- comparison --------------------------------------------------------------------------------------------------


def differing(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Return the keys whose values differ between two dictionaries, in the order of the first."""
    return [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]


def explain(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Return lines that describe how two cases differ, or an empty list if they are equal."""
    names = differing(theirs, ours)
    lines = [f"    {name}: {theirs.get(name, 'absent')} -> {ours.get(name, 'absent')}" for name in names[:SHOWN]]
    return [*lines, f"    and {len(names) - SHOWN} more"] if len(names) > SHOWN else lines


def unlike_resumed(cases: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield (case, lines) for each resumed run that differs from the uninterrupted run."""
    for name in cases:
        if name.startswith("checkpoint, ") and (lines := explain(cases[name], cases[f"resumed {name}"])):
            yield f"resumed {name}, compared with the uninterrupted run", lines


def compare(theirs: Outcome, ours: Outcome) -> dict[str, list[str]]:
    """Return {case: lines that describe its differences} for two outcomes on one backend.

    The list of lines is empty if a case is identical.
    """
    if "left_out" in theirs and "left_out" in ours:
        return {}
    if "left_out" in theirs or "left_out" in ours:
        return {"runs at all": explain(*({"left out": x.get("left_out", "no")} for x in (theirs, ours)))}
    names = {**theirs["cases"], **ours["cases"]}
    found = {name: explain(theirs["cases"].get(name, {}), ours["cases"].get(name, {})) for name in names}
    return {**found, **dict(unlike_resumed(ours["cases"]))}


def report_messages(theirs: Outcome, ours: Outcome) -> None:
    """Print changed error messages."""
    old, new = theirs.get("messages", {}), ours.get("messages", {})
    for name in differing(old, new):
        print(f"  changed message, {name}:\n    {old.get(name, 'none')}\n    {new.get(name, 'none')}")


def report(backend: str, theirs: Outcome, ours: Outcome, verbose: bool) -> int:
    """Print the comparison of two outcomes on a backend; return the number of cases that differ."""
    found = compare(theirs, ours)
    differ = {name: lines for name, lines in found.items() if lines}
    if "left_out" in theirs and "left_out" in ours:
        print(f"{backend}: left out: {ours['left_out']}")
    else:
        print(f"{backend}: {len(found) - len(differ)} cases identical, {len(differ)} differ")
    if theirs["machine"] != ours["machine"]:
        print(f"  different machines or versions, so values may differ: {theirs['machine']}; now {ours['machine']}")
    for name, lines in found.items():
        if lines or verbose:
            print("\n".join([f"  {name}: {'differs' if lines else 'identical'}", *lines]))
    report_messages(theirs, ours)
    return len(differ)


# ---- command -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.compare_versions", description=__doc__.split("\n")[0])
    parser.add_argument("other_tree", nargs="?", type=Path, help="a compiled checkout of another version")
    parser.add_argument("--against", type=Path, metavar="FILE", help="results of --save, instead of another tree")
    parser.add_argument("--save", type=Path, metavar="FILE", help="save the results of the other version")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="separated by commas")
    parser.add_argument("--verbose", action="store_true", help="also list identical cases")
    arguments = parser.parse_args(argv)
    if (arguments.other_tree is None) == (arguments.against is None):
        parser.error("pass another tree, or --against FILE")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run both versions, two processes at a time. Print a report and return the exit status."""
    arguments = parse(argv)
    backends = arguments.backends.split(",")
    against = arguments.against
    other: Path | dict[str, Outcome] = json.loads(against.read_text()) if against else arguments.other_tree.resolve()
    with TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda backend: work_of_both(other, backend, Path(folder)), backends))
    if arguments.save:
        arguments.save.write_text(json.dumps({name: made for name, (made, _) in zip(backends, both, strict=True)}))
    counts = [report(name, *pair, arguments.verbose) for name, pair in zip(backends, both, strict=True)]
    print("identical" if not sum(counts) else f"{sum(counts)} cases differ")
    return int(sum(counts) > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"{error}")
