"""Every optimizer that a user might pick, side by side: steps, memory, whole training steps, scaling.

    python -m bench.run [--only PATTERN] [--optimizers PATTERN] [--sections steps training scaling] [--seconds 540]
    python -m bench.run --page bench/results/<device>-<date>     draws page and plots again from what was measured

Writes results.json, README.md and plots to bench/results/<device>-<date>/, the JSON after everything that was measured,
so that a run that is cut short leaves what it has. What fails is recorded with its error and stops nothing else; what
does not fit into the time is recorded as left out. Peers that are not here have a line that says how to install them
(`python -m bench.peers`). Without a GPU it is a reduced set on the CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import page, plots, roofline, scaling, training
from bench.contest import OTHER, UPDATE, Contestant, Gradients, distinct_blocks, release, run_contest, shapes_for
from bench.gpu_timing import Timer, clock_of
from bench.memory import state_bytes
from bench.optimizers import ENTRIES, Entry
from bench.peers import PEERS, why_missing
from bench.record import gpu, provenance, slug
from bench.run_plans import CPU, GPU, TINY, TINY_WORKLOADS, Plan
from bench.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("steps", "training", "scaling")


@dataclass
class Run:
    """A record in the making."""

    folder: Path
    device: torch.device
    plan: Plan
    deadline: float
    record: dict[str, Any]
    pattern: str = ""
    entries: list[Entry] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.clock = clock_of(self.device)

    @property
    def missing(self) -> list[str]:
        """Modules of peers that are not here."""
        return list(self.record["missing_modules"])

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


def measure_steps(run: Run, workloads: Sequence[Workload], advance: Any) -> None:
    """Every entry on every workload; contestants of a round share the memory of the device."""
    for workload in workloads:
        run.record["workloads"][workload.name] = {
            "num_matrices": len(workload.shapes),
            "num_weights": workload.num_weights,
        }
        gradients = Gradients(workload.num_weights, run.device)
        wanted = [
            (entry, block)
            for entry in run.entries
            if entry.peer not in run.missing
            for block in distinct_blocks(entry, workload, _blocks(entry, workload, run.device))
        ]
        for round_ in rounds(wanted, workload, run.device, run.plan.budget):
            run.record["steps"] += _round(run, workload, gradients, round_)
            run.save()
        del gradients
        release()
        advance(f"steps, {workload.name}")


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
    for start in range(0, len(rest), size - 1):
        yield [*reference, *rest[start : start + size - 1]]


def _round(
    run: Run, workload: Workload, gradients: Gradients, wanted: Sequence[tuple[Entry, int]]
) -> list[dict[str, Any]]:
    contestants = [
        Contestant(entry, block, shapes_for(entry, workload, block), gradients, run.clock, run.device)
        for entry, block in wanted
    ]
    problems = run_contest(contestants, run.plan.limits, run.deadline)
    rows = []
    for number, contestant in enumerate(contestants):
        entry, block = contestant.entry, contestant.block
        row = {"workload": workload.name, "optimizer": entry.name, "block": block}
        row["uncut"] = workload.longest_side <= block or entry.family == "diagonal"
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
        work = roofline.work_of(entry, workload, block, kind)
        if work and roof:
            least = roofline.Roofline(**roof).limit(*work)
            figures[f"roofline of {kind}"] = least / figures[kind]["median"]
    if entry.is_ours and entry.has_period:
        optimizer = entry.make(contestant.params, 1, block)
        optimizer.step()
        figures["state_bytes at T = 1"] = state_bytes(optimizer, contestant.params) / workload.num_weights
    return figures


def measure_training(run: Run, advance: Any) -> None:
    plan = run.plan
    run.record["training"] = training.measure(
        plan.task, run.clock, run.device, run.missing, plan.training_cycles, run.deadline
    )
    advance(f"training, {plan.task.name}")


def measure_scaling(run: Run, advance: Any) -> None:
    plan, found = run.plan, run.record["scaling"]
    entries = [x for x in scaling.series(run.device, run.missing) if x in run.entries]
    common = (entries, run.clock, run.device, plan.scaling_limits, run.deadline)
    found["width"] = scaling.measure(scaling.widths(plan.widths), *common)
    run.save()
    advance("scaling, width")
    found["layers"] = scaling.measure(scaling.layers(plan.layer_counts, plan.layer_side), *common)
    run.save()
    advance("scaling, layers")
    weight = Workload("square", ((plan.period_side,) * 2,))
    found["T"] = scaling.periods(plan.periods, weight, run.clock, run.device, 3, run.deadline)
    advance("scaling, T")


# ---- command line ------------------------------------------------------------------------------------------------


@contextmanager
def progress(total: int) -> Iterator[Any]:
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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="workloads in whose name this occurs")
    parser.add_argument("--optimizers", default="", metavar="PATTERN", help="optimizers in whose name this occurs")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all")
    parser.add_argument("--all", action="store_true", help="on a CPU too, every optimizer and workload")
    parser.add_argument("--seconds", type=float, default=540, help="after these nothing is begun; default %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where PyTorch sees a GPU")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default bench/results/<device>-<date>")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="draw page and plots of a record again, and stop")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests
    return parser.parse_args(arguments)


def new_record(device: torch.device, given: Sequence[str]) -> dict[str, Any]:
    missing = {peer.module: why for peer in PEERS.values() if (why := why_missing(peer.module))}
    return {
        **provenance(shlex.join(["python", "-m", "bench.run", *given])),
        **gpu(device),
        "device_type": device.type,
        "peers": {peer.title: peer.version() for peer in PEERS.values() if peer.module not in missing},
        "missing": {PEERS[module].title: why for module, why in missing.items()},
        "missing_modules": list(missing),
        "roofline": None,
        "workloads": {},
        "steps": [],
        "training": [],
        "scaling": {},
        "plots": {},
        "seconds": 0.0,
    }


def chosen_entries(pattern: str, every: bool, device: torch.device) -> list[Entry]:
    named = [entry for entry in ENTRIES.values() if re.search(pattern, entry.name)]
    return [entry for entry in named if device.type in entry.devices and (every or entry.on_cpu)]


def chosen_workloads(options: argparse.Namespace, every: bool) -> list[Workload]:
    known: Iterable[Workload] = TINY_WORKLOADS if options.tiny else WORKLOADS.values()
    named = [workload for workload in known if re.search(options.only, workload.name)]
    chosen = [workload for workload in named if every or workload.on_cpu or options.tiny]
    return sorted(chosen, key=lambda workload: workload.name != "GPT-2 124M")  # the most wanted first


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write record, page and plots; the exit status is 1 where something failed."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse_arguments(given)
    if options.page:
        write_page(options.page, json.loads((options.page / "results.json").read_text(encoding="utf-8")))
        return 0
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(kind, 0) if kind == "cuda" else torch.device("cpu")
    every = options.all or kind == "cuda"
    record = new_record(device, given)
    folder = options.out or RESULTS / f"{slug(record['device'])}-{record['date']}"
    plan = TINY if options.tiny else GPU if kind == "cuda" else CPU
    run = Run(folder, device, plan, time.perf_counter() + options.seconds, record)
    run.entries = chosen_entries(options.optimizers, every, device)
    workloads = chosen_workloads(options, every)
    measure(run, workloads, options.sections)
    write_page(folder, record)
    run.save()
    print("\n".join(page.target_lines(record)))
    print(f"Wrote {folder / 'README.md'} and results.json, {record['seconds']:.0f} s.")
    return int(
        any("error" in row and "left out" not in row["error"] for row in [*record["steps"], *record["training"]])
    )


def measure(run: Run, workloads: Sequence[Workload], sections: Sequence[str]) -> None:
    """The roofline, then every section, saved one by one."""
    if run.device.type == "cpu":
        torch.zeros(7 << 20)  # the C library keeps memory of this size from now on, as in any training
    steps_first = [*workloads[:1]], [*workloads[1:]]
    pieces = 1 + ("steps" in sections) * len(workloads) + ("training" in sections) + 3 * ("scaling" in sections)
    with progress(pieces) as advance:
        timer = Timer(run.clock, warmups=2, repeats=10, min_repeats=3, seconds=3.0)
        run.record["roofline"] = asdict(roofline.measure(timer, run.device, run.plan.copied, run.plan.product))
        run.save()
        advance("roofline")
        if "steps" in sections:
            measure_steps(run, steps_first[0], advance)
        if "training" in sections:
            measure_training(run, advance)
            run.save()
        if "scaling" in sections:
            measure_scaling(run, advance)
            run.save()
        if "steps" in sections:
            measure_steps(run, steps_first[1], advance)
        run.save()


if __name__ == "__main__":
    sys.exit(main())
