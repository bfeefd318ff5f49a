"""Run stages on a machine with a GPU, each within its own time:

    python -m bench.gpu_run                                  everything, in 12 minutes at most
    python -m bench.gpu_run machine tests quick:120          some stages, one of them with another limit in seconds
    python -m bench.gpu_run --list                           list the stages

Each stage is a process of its own, so that none depends on the one before. Its log and results lie in runs/gpu/, and
everything is packed into gpu-run.tgz (in --out) every 15 seconds and after each stage, so that little is lost if the
run is killed. A bundle made by `make gpu-bundle` is used if there is one; otherwise the package is installed in place.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from bench.common.paths import ROOT
from bench.gpu_run import bundle, machine
from bench.gpu_run.process import Runner, pack_results
from bench.gpu_run.stages import FAILED, STAGES, Limits, Stage

ARCHIVE = "gpu-run.tgz"
SHOWN = {"tests": 12, "again": 12, "quick": 30, "kernels": 30, "peers": 12, "language": 12}
"""The number of last lines of a stage's log that are printed at the end."""


def chosen_stages(names: Sequence[str]) -> list[Stage]:
    """Return the stages of the command line with their limits; those that run by default if there is none.

    Raises:
        ValueError: a stage or a limit does not exist. The message lists the stages.
    """
    if not names:
        return [stage for stage in STAGES.values() if stage.by_default]
    chosen = []
    for text in names:
        name, _, limit = text.partition(":")
        if name not in STAGES:
            raise ValueError(f"stage {name!r} is unknown: choose from {', '.join(STAGES)}")
        if limit and not limit.isdigit():
            raise ValueError(f"stage {text!r}: write the limit as whole seconds, {name}:120")
        chosen.append(STAGES[name]._replace(seconds=int(limit) if limit else STAGES[name].seconds))
    return chosen


def listing() -> str:
    """Return all stages with their limits."""
    lines = [f"{stage.name:10}{stage.seconds:5} s  {stage.what}" for stage in STAGES.values()]
    total = sum(stage.seconds for stage in STAGES.values() if stage.by_default)
    others = ", ".join(name for name, stage in STAGES.items() if not stage.by_default)
    return "\n".join([*lines, f"By default all but {others}: {total} s together."])


def prepare(scratch: Path) -> dict[str, str]:
    """Make this tree ready and return the variables that its processes need.

    Raises:
        SystemExit: PyTorch, Triton or the GPU is missing.
    """
    has_bundle = (bundle.BUNDLE / bundle.ABOUT).exists()
    if problem := machine.problem() or (None if has_bundle else machine.install()):
        raise SystemExit(f"✗ {problem}")
    return {"PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"} | (bundle.use(bundle.BUNDLE, scratch) if has_bundle else {})


def run_all(stages: Sequence[Stage], folder: Path, environment: dict[str, str], archive: Path) -> bool:
    """Run stages one after the other, pack results meanwhile, and return whether every command returned 0."""
    begin, good = time.monotonic(), True
    runner = Runner(environment, ROOT, partial(pack_results, folder, archive))
    for stage in stages:
        commands = stage.commands(Limits(stage.seconds, folder))
        outcome = runner.run(commands, folder / f"{stage.name}.log", stage.seconds)
        good &= outcome.status == 0
        line = f"{time.monotonic() - begin:5.0f} s  {stage.name:9}{outcome.seconds:5.0f} s of {stage.seconds}, "
        line += f"status {outcome.status}: {outcome.note[:140]}"
        print(line, flush=True)
        with (folder / "summary.txt").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        pack_results(folder, archive)
    return good


def show_ends(stages: Sequence[Stage], folder: Path) -> None:
    """Print the last lines of the logs that are worth reading at once."""
    for stage in stages:
        log = folder / f"{stage.name}.log"
        if stage.name in SHOWN and log.exists():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN[stage.name] :]
            print("\n".join([f"== {stage.name}", *(line[:200] for line in lines)]))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE[:SECONDS]", help="default: all but the long ones")
    parser.add_argument("--list", action="store_true", help="print all stages with their limits, and stop")
    out = Path(os.environ.get("OUT") or "runs")
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER", help=f"for {ARCHIVE}; default %(default)s")
    options = parser.parse_args(arguments)
    try:
        options.stages = chosen_stages(options.stages)
    except ValueError as error:
        parser.error(str(error))
    return options


def _end(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; return 0 if every command returned 0."""
    options = parse_arguments(arguments)
    if options.list:
        print(listing())
        return 0
    folder, scratch, archive = ROOT / "runs" / "gpu", ROOT / "build" / "gpu_run", options.out / ARCHIVE
    for each in (folder, scratch):
        each.mkdir(parents=True, exist_ok=True)
    variables = prepare(scratch)
    if any(stage.name == "tests" for stage in options.stages):
        (folder / FAILED).unlink(missing_ok=True)
    variables |= {"ROOTFREE_FAILED": str(folder / FAILED), "ROOTFREE_CUDA_ERRORS": str(folder / "cuda-errors.txt")}
    signal.signal(signal.SIGTERM, _end)  # so that running commands are ended too, and their results packed
    try:
        good = run_all(options.stages, folder, {**os.environ, **variables}, archive)
    finally:
        pack_results(folder, archive)
    bundle.copy_all((folder / "summary.txt", *folder.glob("*.md")), options.out)
    show_ends(options.stages, folder)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
