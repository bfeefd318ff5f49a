"""Check every kernel on this machine's GPU, and time it against the device's limits, eager PyTorch and its peers.

    python -m bench.kernels [--quick] [--only PATTERN] [--seconds 480] [--out DIRECTORY]

Writes <device>-<date>.json to bench/results, and the same as Markdown tables next to it, after every case: a run that
is cut short leaves what it has. A case that fails is recorded with its error and stops no other one. After a CUDA
error, a crash or a case that hangs, a new process goes on with the next case. Cases that do not fit into the time are
recorded as left out. `python -m bench.make_dispatch_table` makes the device's dispatch table of the record. If the tree
is a copy without its .git, set ROOTFREE_COMMIT to the commit that the record should name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import roofline
from bench.common.gpu import why_no_gpu
from bench.common.memory import release
from bench.common.paths import RESULTS
from bench.common.record import gpu, provenance, slug
from bench.common.report import Row, summary, write
from bench.common.restarts import RESTART, Progress, is_spoiled, supervise_module
from bench.common.tensors import random_tensors
from bench.common.timing import Timer, clock_of
from bench.kernels import kron, optimizers, rf_rmsprop, symmetric
from bench.kernels.cases import QUICK, TINY, Case, Context, Sizes, check

STALL = 75.0
"""Seconds without a finished case after which a process is ended: longer than any case takes."""

CEILINGS = "Ceilings"

NOTES = {
    CEILINGS: "What the fractions below are of, measured in the same run; at the end once more, which shows a drift of "
    "the clocks.",
    **rf_rmsprop.NOTES,
    **symmetric.NOTES,
    **kron.NOTES,
    **optimizers.NOTES,
}
"""The text above a table, by table."""


def ceiling_rows(when: str, context: Context) -> list[Row]:
    """Measure the bandwidth of a copy and the rate of a product. The first run's are kept as the roofline."""
    numbers, side = context.sizes.copied, context.sizes.product
    times = roofline.measure_times(context.timer, context.device, numbers, side, (torch.bfloat16,))
    a, b = random_tensors([(side, side)] * 2, context.device, torch.bfloat16)
    check("product", [(a @ b)[:64]], [a[:64].double() @ b.double()])
    found = roofline.Roofline.of(times, numbers, side)
    context.roofline = context.roofline or found
    cells = {
        "copy, TB/s read and written": found.bandwidth / 1e12,
        "copy µs": times["copy"],
        f"BF16 {side}³, TFLOP/s": found.bf16 / 1e12,
        "product µs": times["torch.bfloat16 mm"],
    }
    return [Row(CEILINGS, when, cells)]


def cases(context: Context, arguments: list[str]) -> list[Case]:
    """Return everything that is measured, the most wanted first."""
    return [
        Case(CEILINGS, "at the start", partial(ceiling_rows, "at the start", context)),
        *rf_rmsprop.diagonal_cases(rf_rmsprop.DiagonalLists, context),
        *symmetric.symmetric_cases(context),
        *kron.block_cases(context),
        *optimizers.optimizer_cases(context, arguments),
        *rf_rmsprop.diagonal_cases(rf_rmsprop.ScaledLists, context),
        *rf_rmsprop.momentum_cases(context),
        *optimizers.graph_cases(context),
        Case(CEILINGS, "at the end", partial(ceiling_rows, "at the end", context)),
    ]


def run(case: Case, context: Context) -> list[Row]:
    """Return the rows of a case, or one row with the error if it fails."""
    try:
        return list(case.run())
    except Exception as error:  # of any kind: it is recorded, and the other cases are measured
        return [Row(case.table, case.name, error=f"{type(error).__name__}: {error}")]
    finally:
        release()


def run_all(
    wanted: Sequence[Case], context: Context, progress: Progress, save: Callable[[list[Row]], None]
) -> list[Row] | None:
    """Return the rows of all cases; None if another process has to go on, since a CUDA error spoiled this one.

    `save(rows)` is called after every case. What `progress` has from the process before is not measured again.
    """
    rows, context.roofline = progress.payload or ([], context.roofline)
    for case in wanted:
        name, spoiled = f"{case.table}, {case.name}", False
        if name in progress.done:
            continue
        if name in progress.broken:
            found = [Row(case.table, case.name, error=progress.broken[name])]
        elif time.time() > progress.until:
            found = [Row(case.table, case.name, error="left out: the run's time was over")]
        else:
            progress.begin(name)
            found = _run_and_say(case, context)
            spoiled = any(row.error for row in found) and is_spoiled(context.device)
        rows += found
        progress.end((rows, context.roofline), name)
        save(rows)
        if spoiled:
            return None
    save(rows)
    return rows


def _run_and_say(case: Case, context: Context) -> list[Row]:
    start = time.perf_counter()
    found = run(case, context)
    problems = [row.error for row in found if row.error]
    outcome = f"✗ {' '.join(problems[0].split())[:200]}" if problems else "done"
    print(f"{time.perf_counter() - start:6.1f} s  {case.table}, {case.name}: {outcome}", flush=True)
    return found


# ---- command line --------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--only", default="", metavar="PATTERN", help='cases in whose "table, name" this occurs')
    parser.add_argument("--seconds", type=float, default=480, help="after these no case is begun; default %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIRECTORY", help="default %(default)s")
    # For the tests, which have no GPU; and for processes that this one starts.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first-step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_context(options: argparse.Namespace) -> Context:
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    clock = clock_of(device)
    timer = Timer(clock)
    if options.tiny:
        timer = Timer(clock, warmups=1, repeats=1, min_repeats=1, seconds=0.1)
    elif options.quick:
        timer = Timer(clock, repeats=20, seconds=1.0)
    return Context(device, TINY if options.tiny else QUICK if options.quick else Sizes(), timer)


def why_not(options: argparse.Namespace) -> str | None:
    """Return why nothing can be measured here, or None."""
    if options.device == "cuda" and (why := why_no_gpu()):
        return f"bench.kernels needs a GPU that PyTorch can use: {why}."
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if options.device == "cuda" and interpreted:
        return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU: unset it to measure them."
    if options.device == "cpu" and not interpreted:
        return "set TRITON_INTERPRET=1 to try bench.kernels on a CPU."
    return None


def record_path(options: argparse.Namespace, record: dict[str, Any]) -> Path:
    parts = [slug(record["device"]), record["date"], *(name for name in ("quick", "tiny") if getattr(options, name))]
    return options.out / f"{'-'.join([*parts, *(['part'] if options.only else [])])}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the record, and return the exit status: 0 if all cases were measured."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse_arguments(given)
    if problem := why_not(options):
        print(f"✗ {problem}")
        return 1
    if options.first_step:
        print(json.dumps(optimizers.first_steps(make_context(options))))
        return 0
    if options.device == "cuda" and options.worker is None:
        return supervise_module("bench.kernels", given, options.seconds, STALL)
    return measure(options, given)


def measure(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Measure in this process, and return the exit status; RESTART if another process has to go on."""
    context = make_context(options)
    command = [x for x in given if x not in ("--worker", str(options.worker))]
    record = {**provenance(shlex.join(["python", "-m", "bench.kernels", *command])), **gpu(context.device)}
    path = record_path(options, record)
    same = ["--device", options.device, *(f"--{name}" for name in ("tiny", "quick") if getattr(options, name))]
    wanted = cases(context, same)
    chosen = [case for case in wanted if re.search(options.only, f"{case.table}, {case.name}") or case is wanted[0]]
    new = Progress(path.with_suffix(".progress"), time.time() + options.seconds)
    progress = Progress.load(options.worker) if options.worker else new
    rows = run_all(chosen, context, progress, lambda rows: write(record, rows, NOTES, path))
    new.path.unlink(missing_ok=True)
    if rows is None:
        return RESTART
    print("\n".join(summary(rows)))
    print(f"Wrote {path} and {path.with_suffix('.md')}.")
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
