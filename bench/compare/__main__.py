"""Every optimizer that a user might pick, side by side: steps, memory, whole training steps, scaling.

    python -m bench.compare [--only PATTERN] [--optimizers PATTERN] [--sections steps training scaling] [--seconds 540]
    python -m bench.compare --page bench/results/<device>-<date>     draws page and plots of a record again

Writes results.json, README.md and plots to bench/results/<device>-<date>/. The JSON is written after every piece, so
that a run that is cut short leaves what it has. An error is recorded and stops nothing else: on a GPU a new process
goes on after a CUDA error, a crash or a piece that hangs. A piece that does not fit into the time is recorded as left
out. For a missing peer the page says how to install it (`python -m bench.common.peers`). On a CPU fewer optimizers and
workloads are measured.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common.memory import settle_allocator
from bench.common.muon import muon_is_fp32
from bench.common.paths import RESULTS
from bench.common.peers import PEERS, why_missing
from bench.common.record import gpu, provenance, read_json, slug
from bench.common.restarts import RESTART, Progress, Spoiled, is_spoiled, supervise_module
from bench.compare import page, settings
from bench.compare.sections import Piece, Run, pieces_of

STALL = 150.0
"""Seconds without a finished piece after which a process on a GPU is ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write record, page and plots, and return the exit status: 1 if something failed."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = settings.parse_arguments(given, (__doc__ or "").partition("\n")[0])
    if options.page:
        page.write(read_json(options.page / "results.json"), options.page)
        return 0
    if options.device == "cuda" and options.worker is None:
        return supervise_module("bench.compare", given, options.seconds, STALL)
    with tempfile.TemporaryDirectory() as scratch:
        new = Progress(Path(scratch) / "progress", time.time() + options.seconds)
        return measure(options, given, Progress.load(options.worker) if options.worker else new)


def measure(options: argparse.Namespace, given: Sequence[str], progress: Progress) -> int:
    """Measure in this process, and return the exit status: RESTART if another one has to go on."""
    run = new_run(options, given, progress)
    finished = measure_all(run, pieces_of(run, settings.chosen_workloads(options), options.sections))
    page.write(run.record, run.folder)
    run.save()
    if not finished:
        return RESTART
    print("\n".join(page.target_lines(run.record)))
    print(f"Wrote {run.folder / 'README.md'} and results.json, {run.record['seconds']:.0f} s.")
    return int(has_failed(run.record))


def new_run(options: argparse.Namespace, given: Sequence[str], progress: Progress) -> Run:
    """Return a new run. Its record is empty, or the one that the previous process left."""
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    record = new_record(device, [x for x in given if x not in ("--worker", str(options.worker))])
    folder = options.out or RESULTS / f"{slug(record['device'])}-{record['date']}"
    chosen = settings.chosen_entries(options)
    left_out = {entry.name: why for entry in chosen if (why := entry.why_left_out(device))}
    record["missing"] |= left_out
    absent = (*left_out, *record["missing_modules"])
    entries = [entry for entry in chosen if entry.name not in absent and entry.peer not in absent]
    if progress.done and (folder / "results.json").exists():
        record = read_json(folder / "results.json")
    record["errors"] |= progress.broken
    plan = settings.TINY if options.tiny else settings.GPU if device.type == "cuda" else settings.CPU
    deadline = time.perf_counter() + progress.until - time.time()
    return Run(folder, device, plan, deadline, record, entries, progress)


def new_record(device: torch.device, given: Sequence[str]) -> dict[str, Any]:
    missing = {peer.module: why for peer in PEERS.values() if (why := why_missing(peer.module))}
    return {
        **provenance(shlex.join(["python", "-m", "bench.compare", *given])),
        **gpu(device),
        "device_type": device.type,
        "muon_is_fp32": muon_is_fp32(device),
        "peers": {peer.title: peer.version() for peer in PEERS.values() if peer.module not in missing},
        "missing": {PEERS[module].title: why for module, why in missing.items()},
        "missing_modules": list(missing),
        "roofline": None,
        "workloads": {},
        "steps": [],
        "rows": [],
        "training": [],
        "scaling": {},
        "errors": {},
        "plots": {},
        "seconds": 0.0,
    }


def measure_all(run: Run, pieces: Mapping[str, Piece]) -> bool:
    """Measure what is left; return False if an error spoiled the device, so that another process has to go on."""
    progress = run.progress
    if run.device.type == "cpu":
        settle_allocator()
    for number, (name, piece) in enumerate(pieces.items(), 1):
        if name not in progress.done and name not in progress.broken:
            progress.begin(name)
            try:
                piece()
            except Spoiled as error:
                print(f"✗ {name}: {error}", flush=True)
                return False
            except Exception as error:  # of any kind: it is recorded, and the other pieces go on
                run.record["errors"][name] = f"{type(error).__name__}: {error}"
            finally:
                run.save()
            progress.end()
            if is_spoiled(run.device):
                return False
        print(f"{time.perf_counter() - run.started:6.1f} s  {number} of {len(pieces)}: {name}", flush=True)
    return True


def has_failed(record: dict[str, Any]) -> bool:
    """Return whether something could not be measured, other than for lack of time."""
    rows = [row for part in (record["steps"], record["training"], *record["scaling"].values()) for row in part]
    return bool(record["errors"]) or any("left out" not in row["error"] for row in rows if "error" in row)


if __name__ == "__main__":
    sys.exit(main())
