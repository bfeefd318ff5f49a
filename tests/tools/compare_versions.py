"""Compare what two versions of the package make of the same work, to the bit.

    python -m tests.tools.compare_versions OTHER_TREE [--save FILE] [--backends eager,cpp,triton] [--verbose]
    python -m tests.tools.compare_versions --against FILE

Both versions, that of this tree and that of OTHER_TREE, do the work of `version_worker` in processes of their own,
once for each backend: operators by their flat schemas, training with every kind of option, checkpoints that the other
version saved, and mistakes. Triton's kernels are interpreted. Every tensor that comes of it is compared by a hash of
its bytes; the exit status is 1 where any differs. Words of error messages may be improved, and are listed apart.

--save FILE keeps what OTHER_TREE made, with its checkpoints, and --against FILE takes that in place of OTHER_TREE.
Other machines and versions of PyTorch may round otherwise: what was used is kept too, and a difference is pointed out.
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
"""Backends that run on a CPU, the one that takes longest first."""

TIME_LIMIT = 600.0
SHOWN = 8
"""Entries of a case that are listed."""

Outcome = dict[str, Any]
"""What a version made on one backend: `machine`, and `left_out`, or else `cases`, `messages` and `checkpoints`."""


def environment(tree: Path, backend: str) -> dict[str, str]:
    """Return the environment in which a tree's version runs on a backend."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ROOTFREE_", "TRITON_"))}
    own = {"PYTHONPATH": str(tree), "ROOTFREE_BACKEND": backend, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return {**inherited, **own, **({"TRITON_INTERPRET": "1"} if backend == "triton" else {})}


def work(tree: Path, backend: str, checkpoints: Path | None, output: Path) -> Outcome:
    """Let the version of a tree work on a backend, and return the outcome.

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
    """Return the outcomes of the other version, a tree's or a saved one, and of this tree, with its checkpoints."""
    theirs = folder / f"{backend}-other.json"
    if isinstance(other, Path):
        made = work(other, backend, None, theirs)
    else:
        made = other[backend]
        theirs.write_text(json.dumps(made))
    return made, work(ROOT, backend, theirs if "checkpoints" in made else None, folder / f"{backend}-this.json")


# ---- comparison --------------------------------------------------------------------------------------------------


def differing(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Return the names under which two dictionaries differ, in the order of the first."""
    return [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]


def explain(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Return lines on how two cases differ, none where they do not."""
    names = differing(theirs, ours)
    lines = [f"    {name}: {theirs.get(name, 'absent')} -> {ours.get(name, 'absent')}" for name in names[:SHOWN]]
    return [*lines, f"    and {len(names) - SHOWN} more"] if len(names) > SHOWN else lines


def unlike_resumed(cases: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield (case, lines) where a resumed run is unlike the one that was not interrupted."""
    for name in cases:
        if name.startswith("checkpoint, ") and (lines := explain(cases[name], cases[f"resumed {name}"])):
            yield f"resumed {name}, beside the run that went on", lines


def compare(theirs: Outcome, ours: Outcome) -> dict[str, list[str]]:
    """Return how two outcomes on one backend differ: lines by the names of all cases, none where they are identical."""
    if "left_out" in theirs and "left_out" in ours:
        return {}
    if "left_out" in theirs or "left_out" in ours:
        return {"runs at all": explain(*({"left out": x.get("left_out", "no")} for x in (theirs, ours)))}
    names = {**theirs["cases"], **ours["cases"]}
    found = {name: explain(theirs["cases"].get(name, {}), ours["cases"].get(name, {})) for name in names}
    return {**found, **dict(unlike_resumed(ours["cases"]))}


def report_messages(theirs: Outcome, ours: Outcome) -> None:
    """Print the messages that differ."""
    old, new = theirs.get("messages", {}), ours.get("messages", {})
    for name in differing(old, new):
        print(f"  message that differs, {name}:\n    {old.get(name, 'none')}\n    {new.get(name, 'none')}")


def report(backend: str, theirs: Outcome, ours: Outcome, verbose: bool) -> int:
    """Print how two outcomes on a backend compare, and return the number of cases that differ."""
    found = compare(theirs, ours)
    differ = {name: lines for name, lines in found.items() if lines}
    if "left_out" in theirs and "left_out" in ours:
        print(f"{backend}: left out: {ours['left_out']}")
    else:
        print(f"{backend}: {len(found) - len(differ)} cases identical, {len(differ)} differ")
    if theirs["machine"] != ours["machine"]:
        print(f"  not made alike, so that numbers may differ: {theirs['machine']}; now {ours['machine']}")
    for name, lines in found.items():
        if lines or verbose:
            print("\n".join([f"  {name}: {'differs' if lines else 'identical'}", *lines]))
    report_messages(theirs, ours)
    return len(differ)


# ---- command -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.compare_versions", description=__doc__.split("\n")[0])
    parser.add_argument("other_tree", nargs="?", type=Path, help="a checkout of another version, with what it compiled")
    parser.add_argument("--against", type=Path, metavar="FILE", help="what --save kept, in place of another tree")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep what the other version made")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="separated by commas")
    parser.add_argument("--verbose", action="store_true", help="list the cases that are identical too")
    arguments = parser.parse_args(argv)
    if (arguments.other_tree is None) == (arguments.against is None):
        parser.error("pass another tree, or --against FILE")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run both versions, two processes at a time, report, and return the exit status."""
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
