"""Every optimizer that a user might pick, side by side: steps, memory, whole training steps, scaling.

    python -m bench.compare [--only PATTERN] [--optimizers PATTERN] [--sections steps training scaling] [--seconds 540]
    python -m bench.compare --page bench/results/<device>-<date>     draws page and plots again from what was measured

Writes results.json, README.md and plots to bench/results/<device>-<date>/, the JSON after everything that was measured,
so that a run that is cut short leaves what it has. What fails is recorded with its error and stops nothing else: on a
GPU a new process goes on after a CUDA error, a crash or a piece that hangs. What does not fit into the time is recorded
as left out. Peers that are not here have a line that says how to install them
(`python -m bench.common.peers`). Without a GPU it is a reduced set on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import roofline
from bench.common.memory import state_bytes
from bench.common.optimizers import ENTRIES, Entry, muon_is_fp32
from bench.common.paths import RESULTS
from bench.common.peers import PEERS, why_missing
from bench.common.record import gpu, provenance, slug
from bench.common.restarts import RESTART, Progress, Spoiled, focus_path, is_spoiled, supervise
from bench.common.timing import Timer, clock_of
from bench.common.workloads import Workload
from bench.compare import page, plots, scaling, training
from bench.compare.alternatives import alternatives, backend_of
from bench.compare.contest import (
    OTHER,
    UPDATE,
    Contestant,
    Gradients,
    distinct_blocks,
    release,
    run_contest,
    shapes_for,
)
from bench.compare.options import chosen_entries, chosen_workloads, parse_arguments
from bench.compare.plans import CPU, GPU, TINY, Plan
from bench.compare.work import work_of

STALL = 150.0
"""Seconds without a finished piece after which a process on a GPU is ended."""

Piece = Callable[[], None]


@dataclass
class Run:
    """A record in the making."""

    folder: Path
    device: torch.device
    plan: Plan
    deadline: float
    record: dict[str, Any]
    entries: list[Entry]
    """Those that were chosen; `missing` are among them."""

    progress: Progress | None = None
    """What the process before this one, if any, has done."""

    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.clock = clock_of(self.device)

    @property
    def missing(self) -> list[str]:
        """Modules of peers that are not here."""
        return list(self.record["missing_modules"])

    def attempt(self, name: str, piece: Piece) -> None:
        """Measure a piece and save it; what it raises is recorded, and the other pieces go on."""
        try:
            piece()
        except Spoiled:
            raise
        except Exception as error:
            self.record["errors"][name] = f"{type(error).__name__}: {error}"
        finally:
            self.save()

    def save(self) -> None:
        """Write the JSON, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record["seconds"] = time.perf_counter() - self.started
        whole = json.dumps(self.record, indent=1, ensure_ascii=False) + "\n"
        part = self.folder / "results.json.part"
        part.write_text(whole, encoding="utf-8")
        part.replace(self.folder / "results.json")


def write_page(folder: Path, record: dict[str, Any]) -> None:
    """Page and plots of a record."""
    record["plots"] = plots.draw_all(record, folder)
    (folder / "README.md").write_text(page.markdown(record), encoding="utf-8")


# ---- sections ----------------------------------------------------------------------------------------------------


def measure_roofline(run: Run) -> None:
    timer = Timer(run.clock, warmups=2, repeats=10, min_repeats=3, seconds=3.0)
    run.record["roofline"] = asdict(roofline.measure(timer, run.device, run.plan.copied, run.plan.product))


def measure_steps(run: Run, workload: Workload) -> None:
    """Every entry on a workload; contestants of a round share the memory of the device."""
    run.record["workloads"][workload.name] = {
        "num_matrices": len(workload.shapes),
        "num_weights": workload.num_weights,
        "longest_side": workload.longest_side,
    }
    # A process that ended may have left rows of this workload.
    for rows, column in ((run.record["steps"], "workload"), (run.record["rows"], "case")):
        rows[:] = [row for row in rows if row[column].partition(", ")[0] != workload.name]
    gradients = Gradients(workload.num_weights, run.device)
    wanted = [
        (entry, block)
        for entry in run.entries
        if entry.peer not in run.missing
        for block in distinct_blocks(entry, workload, _blocks(entry, workload, run.device))
    ]
    excluded = run.progress.excluded if run.progress else {}
    for entry, block in wanted:
        if reason := excluded.get(_title(workload, entry, block)):
            row = {"workload": workload.name, "optimizer": entry.name, "block": block, "round": 0, "error": reason}
            run.record["steps"].append(row | {"uncut": _is_uncut(workload, entry, block)})
    wanted = [pair for pair in wanted if _title(workload, *pair) not in excluded]
    for number, round_ in enumerate(rounds(wanted, workload, run.device, run.plan.budget)):
        rows = _round(run, workload, gradients, round_)
        run.record["steps"] += [row | {"round": number} for row in rows]
        run.record["rows"] += alternatives(workload, rows)
        run.save()
        release()


def _title(workload: Workload, entry: Entry, block: int) -> str:
    return f"{workload.name}, {entry.name}, {block}"


def _is_uncut(workload: Workload, entry: Entry, block: int) -> bool:
    return workload.longest_side <= block or entry.family == "diagonal"


def _blocks(entry: Entry, workload: Workload, device: torch.device) -> tuple[int, ...]:
    """The block sizes that are worth their time: on a CPU, an update by Distributed Shampoo or SOAP of a weight that is
    4096 wide takes a third of a minute, whole."""
    slow = device.type == "cpu" and entry.family in ("Shampoo", "SOAP") and workload.longest_side > 2048
    return entry.blocks[:1] if slow else entry.blocks


def rounds(
    wanted: Sequence[tuple[Entry, int]], workload: Workload, device: torch.device, budget: float
) -> Iterator[Any]:
    """Contestants whose weights and state fit together, the fastest setting of ours in each round for comparison."""
    if device.type != "cuda":
        yield wanted
        return
    free = torch.cuda.mem_get_info(device)[0] * budget
    size = max(2, int(free / (workload.num_weights * 40)))  # 4 bytes of weights, and of state and scratch up to 36
    reference = [pair for pair in wanted if pair[0].name == page.DEFAULT][:1]
    rest = [pair for pair in wanted if pair not in reference]
    for start in range(0, max(len(rest), 1), size - 1):
        yield [*reference, *rest[start : start + size - 1]]


def _round(
    run: Run, workload: Workload, gradients: Gradients, wanted: Sequence[tuple[Entry, int]]
) -> list[dict[str, Any]]:
    contestants = [
        Contestant(entry, block, shapes_for(entry, workload, block), gradients, run.clock, run.device)
        for entry, block in wanted
    ]

    def on_turn(contestant: Contestant) -> None:
        if run.progress and run.device.type == "cuda":
            run.progress.focus(_title(workload, contestant.entry, contestant.block))

    problems = run_contest(contestants, run.plan.limits, run.deadline, on_turn)
    rows = []
    for number, contestant in enumerate(contestants):
        entry, block = contestant.entry, contestant.block
        row = {"workload": workload.name, "optimizer": entry.name, "block": block}
        row["uncut"] = _is_uncut(workload, entry, block)
        try:
            rows.append(
                row | ({"error": problems[number]} if number in problems else _figures(run, workload, contestant))
            )
        except Exception as error:  # of any kind: it is recorded, and the others go on
            rows.append(row | {"error": f"{type(error).__name__}: {error}"})
    return rows


def _figures(run: Run, workload: Workload, contestant: Contestant) -> dict[str, Any]:
    """What was measured of a contestant, with its fractions of the roofline."""
    entry, block = contestant.entry, contestant.block
    figures = contestant.measured()
    roof = run.record["roofline"]
    for kind in (UPDATE, OTHER):
        work = work_of(entry, workload, block, kind)
        if work and roof:
            least = roofline.Roofline(**roof).limit(*work)
            figures[f"roofline of {kind}"] = least / figures[kind]["median"]
    if entry.is_ours:
        figures["backend"] = backend_of(contestant.optimizer)
    if entry.is_ours and entry.has_period:
        optimizer = entry.make(contestant.params, 1, block)
        optimizer.step()
        figures["state_bytes at T = 1"] = state_bytes(optimizer, contestant.params) / workload.num_weights
    return figures


def measure_training(run: Run, names: Sequence[str]) -> None:
    plan = run.plan
    run.record["training"] += training.measure(
        plan.task, run.clock, run.device, names, plan.training_cycles, run.deadline
    )


def training_pieces(run: Run) -> list[tuple[str, Piece]]:
    """Return one piece for each optimizer on a GPU, where it trains alone; on a CPU, where they take turns, one."""
    entries = [entry for entry in run.entries if entry.peer not in run.missing]
    names = training.names_of(run.device, entries)
    groups = [[name] for name in names] if run.device.type == "cuda" else [names]
    title = f"training, {run.plan.task.name}"
    titles = [f"{title}, {group[0]}" if run.device.type == "cuda" else title for group in groups]
    return [(name, partial(measure_training, run, group)) for name, group in zip(titles, groups, strict=True)]


def measure_scaling(run: Run, of: str, sizes: Sequence[tuple[int, Workload]]) -> None:
    """Width or number of layers."""
    entries = [x for x in scaling.series(run.device, run.missing) if x in run.entries]
    limits = run.plan.scaling_limits
    run.record["scaling"][of] = scaling.measure(sizes, entries, run.clock, run.device, limits, run.deadline)


def measure_periods(run: Run) -> None:
    weight = Workload("square", ((run.plan.period_side,) * 2,))
    run.record["scaling"]["T"] = scaling.periods(run.plan.periods, weight, run.clock, run.device, 3, run.deadline)


def pieces_of(run: Run, workloads: Sequence[Workload], sections: Sequence[str]) -> list[tuple[str, Piece]]:
    """What is measured one by one, by name: the roofline, the steps of the first workload, the rest."""
    plan = run.plan
    steps: list[tuple[str, Piece]] = [(f"steps, {x.name}", partial(measure_steps, run, x)) for x in workloads]
    others: list[tuple[str, Piece]] = []
    if "training" in sections:
        others += training_pieces(run)
    if "scaling" in sections:
        widths, layers = scaling.widths(plan.widths), scaling.layers(plan.layer_counts, plan.layer_side)
        others.append(("scaling, width", partial(measure_scaling, run, "width", widths)))
        others.append(("scaling, layers", partial(measure_scaling, run, "layers", layers)))
        if ENTRIES[page.DEFAULT] in run.entries:
            others.append(("scaling, T", partial(measure_periods, run)))
    first = ("roofline", partial(measure_roofline, run))
    return [first, *steps[:1], *others, *steps[1:]] if "steps" in sections else [first, *others]


def measure(run: Run, pieces: Sequence[tuple[str, Piece]], progress: Progress) -> bool:
    """Measure the rest; return False if another process has to go on, since a CUDA error spoiled this one."""
    if run.device.type == "cpu":
        torch.zeros(7 << 20)  # the C library keeps memory of this size from now on, as in any training
    with progress_bar(len(pieces)) as advance:
        for name, piece in pieces:
            if name not in progress.done and name not in progress.broken:
                progress.begin(name)
                try:
                    run.attempt(name, piece)
                except Spoiled as error:
                    print(f"✗ {name}: {error}", flush=True)
                    return False
                progress.end()
                if is_spoiled(run.device):
                    return False
            advance(name)
    return True


# ---- command line ------------------------------------------------------------------------------------------------


@contextmanager
def progress_bar(total: int) -> Iterator[Any]:
    """A function that is told of every finished piece: a bar where there is rich and a terminal, or else lines."""
    start = time.perf_counter()

    def say(done: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {done}", flush=True)

    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield say
        return
    if not sys.stdout.isatty():
        yield say
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda done: bar.update(task, advance=1, description=done)


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


def has_failed(record: dict[str, Any]) -> bool:
    """Whether something could not be measured, other than for lack of time."""
    rows = [row for part in (record["steps"], record["training"], *record["scaling"].values()) for row in part]
    return bool(record["errors"]) or any("left out" not in row["error"] for row in rows if "error" in row)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write record, page and plots; the exit status is 1 where something failed."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse_arguments(given, (__doc__ or "").partition("\n")[0])
    if options.page:
        write_page(options.page, json.loads((options.page / "results.json").read_text(encoding="utf-8")))
        return 0
    if options.device == "cuda" and options.worker is None:
        file, path = tempfile.mkstemp(prefix="bench-run-")
        os.close(file)
        command = [sys.executable, "-m", "bench.compare", *given, "--worker", path]
        try:
            return supervise(command, Path(path), options.seconds, STALL)
        finally:
            for left in (Path(path), focus_path(Path(path))):
                left.unlink(missing_ok=True)
    return measure_here(options, given)


def measure_here(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Measure in this process, and return the exit status; RESTART where another one has to go on."""
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    record = new_record(device, [x for x in given if x not in ("--worker", str(options.worker))])
    folder = options.out or RESULTS / f"{slug(record['device'])}-{record['date']}"
    plan = TINY if options.tiny else GPU if device.type == "cuda" else CPU
    chosen = chosen_entries(options)
    record["missing"] |= {entry.name: why for entry in chosen if (why := entry.why_left_out(device))}
    entries = [entry for entry in chosen if entry.name not in record["missing"]]
    with tempfile.TemporaryDirectory() as scratch:
        new = Progress(Path(scratch) / "progress", time.time() + options.seconds)
        progress = Progress.load(options.worker) if options.worker else new
        if progress.done and (folder / "results.json").exists():
            record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        record["errors"] |= progress.broken
        deadline = time.perf_counter() + progress.until - time.time()
        run = Run(folder, device, plan, deadline, record, entries, progress)
        finished = measure(run, pieces_of(run, chosen_workloads(options), options.sections), progress)
    write_page(folder, record)
    run.save()
    if not finished:
        return RESTART
    print("\n".join(page.target_lines(record)))
    print(f"Wrote {folder / 'README.md'} and results.json, {record['seconds']:.0f} s.")
    return int(has_failed(record))


if __name__ == "__main__":
    sys.exit(main())
