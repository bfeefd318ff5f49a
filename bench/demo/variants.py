"""Train the demo's small model by variants of its methods: dtypes of factors, rounding, directions, clipped gradients.

    python -m bench.demo.variants [--cases NAME ...] [--seeds 0 1 2] [--steps N]     default: adamw muon recipe
    python -m bench.demo.variants --cases rounding slow-rounding --seeds 0 1
    python -m bench.demo.variants --page bench/results/recipe-2026-11-28.jsonl       print the table of a record

Settings are those of `bench.demo`, found on seed 0. The cases named "rounding: …" store IF-Shampoo's factors in every
way; those named "slow-rounding: …" do so with a small `beta2`, at which rounding to nearest stalls, because a step no
longer moves a factor's diagonal by half a BF16 unit. A name before a colon stands for all of its cases.

Every run is a line of bench/results/variants-<date>.jsonl. A table of all lines is printed and written beside it, with
ratios to the first case of a group.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common.paths import RESULTS
from bench.common.record import provenance
from bench.common.report import cell, table
from bench.demo.data import Corpus, standard_library
from bench.demo.settings import Task, settings_of
from bench.demo.train import Session, Trainee, train


class Case(NamedTuple):
    """A way to train: the method, what differs from its settings, and the norm to which gradients are clipped."""

    method: str
    changes: Mapping[str, Any]
    clip: float | None = None


FP32 = {"factor_dtype": torch.float32}
ROUNDING: dict[str, dict[str, Any]] = {
    "fp32": FP32,
    "bf16, stochastic": {"factor_dtype": torch.bfloat16, "rounding": "stochastic"},
    "bf16, compensated": {"factor_dtype": torch.bfloat16, "rounding": "compensated"},
    "bf16, nearest": {"factor_dtype": torch.bfloat16, "rounding": "nearest"},
}
SLOW = {"beta2": 0.02, "lr": 1e-3}
"""With factors that learn slowly the update stays small, hence the larger lr."""

WHITENED = {"direction": "whitened", "damping": 1e-8}
CASES = {
    "adamw": Case("adamw", {}),
    "muon": Case("muon", {}),
    "recipe: default": Case("recipe", {}),
    "recipe: FP32 factors": Case("recipe", FP32),
    "recipe: compensated BF16 factors": Case("recipe", {"rounding": "compensated"}),
    "recipe: root-free direction": Case("recipe", {"direction": "root_free", "damping": 1e-3}),
    "recipe: root-free matrices": Case("recipe", {"direction": "root_free", "damping": 1e-3, "rest": WHITENED}),
    "recipe: clipped at 1": Case("recipe", {}, clip=1.0),
    "recipe: clipped at 0.01, always": Case("recipe", {}, clip=0.01),
    "recipe: T = 2": Case("recipe", {"precondition_frequency": 2}),
    "recipe: least memory": Case("recipe", {"packed_momentum": True, "state_dtype": torch.bfloat16}),
    **{f"rounding: {name}": Case("ifshampoo", changes) for name, changes in ROUNDING.items()},
    **{f"slow-rounding: {name}": Case("ifshampoo", {**SLOW, **changes}) for name, changes in ROUNDING.items()},
}


def group_of(name: str) -> str:
    """Return the part of a case's name before the colon, or all of it."""
    return name.partition(":")[0]


def current_name(name: str) -> str:
    """Return what a case of an old record is called now: "recipe, T = 2" is "recipe: T = 2"."""
    return "recipe: default" if name == "recipe" else re.sub("^recipe, ", "recipe: ", name)


GROUPS = {group_of(name): name for name in reversed(CASES)}
"""The first case of every group, with which the others are compared."""

DEFAULT = ("adamw", "muon", "recipe")
LOSSES = ("final_train_loss", "held_out_loss")


def measure(name: str, task: Task, corpus: Corpus) -> dict[str, Any]:
    """Train once and return the result."""
    case = CASES[name]
    settings = settings_of(case.method, "small", case.changes)
    run = train(Trainee(case.method, settings, Session(task, corpus, evaluations=1, clip=case.clip)))
    return {
        "case": name,
        "seed": task.seed,
        **run.figures(),
        "diverged": run.diverged or None,
        "settings": {key: str(value) for key, value in settings.items()},
        "clip": case.clip,
        "task": asdict(task),
        **provenance(shlex.join(["python", "-m", "bench.demo.variants", *sys.argv[1:]])),
    }


# ---- the table -----------------------------------------------------------------------------------------------------

Rows = Sequence[Mapping[str, Any]]
"""Runs of one case, as the record has them. Those of old records have neither a task nor a final training loss."""


def has_diverged(row: Mapping[str, Any]) -> bool:
    return bool(row.get("diverged")) or row["held_out_loss"] is None


def mean_of(rows: Rows, loss: str) -> float | None:
    """Return the mean loss of the runs that did not diverge, None without one."""
    known = [row[loss] for row in rows if not has_diverged(row) and row.get(loss) is not None]
    return statistics.fmean(known) if known else None


def loss_cell(rows: Rows, first: Rows, loss: str) -> str:
    """Return the mean loss of a case, its ratio to that of the first case, and the seeds that diverged."""
    mean, unit = mean_of(rows, loss), mean_of(first, loss)
    parts = [] if mean is None else [f"{mean:.4f}" + (f" ({mean / unit:.3f})" if unit else "")]
    if diverged := [str(row["seed"]) for row in rows if has_diverged(row)]:
        parts.append(f"diverged (seed{'s' * (len(diverged) > 1)} {' '.join(diverged)})")
    return ", ".join(parts) or "–"


def summary(rows: Rows) -> str:
    """Return a table with a line for each case and number of steps."""
    cases: dict[tuple[int | None, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row.get("task", {}).get("steps"), current_name(row["case"])), []).append(row)
    lines = []
    for (steps, name), runs in cases.items():
        first = cases.get((steps, GROUPS.get(group_of(name), name)), [])
        losses = (loss_cell(runs, first, loss) for loss in LOSSES)
        state = max(row["state_bytes"] for row in runs)
        seeds = " ".join(str(row["seed"]) for row in runs)
        lines.append([name, cell(steps), seeds, *losses, f"{state / 1e6:.1f} MB" if state else "–"])
    return "\n".join(table(["case", "steps", "seeds", "final train loss", "held-out loss", "optimizer state"], lines))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({*GROUPS, *CASES})
    parser.add_argument(
        "--cases", nargs="+", choices=names, default=DEFAULT, metavar="NAME", help="default adamw muon recipe"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Task().steps)
    parser.add_argument("--out", type=Path, default=RESULTS / f"variants-{datetime.date.today()}.jsonl")
    parser.add_argument("--page", type=Path, metavar="RECORD.jsonl", help="print the table of a record, and stop")
    options = parser.parse_args()
    if options.page:
        print(summary(read(options.page)))
        return
    corpus = standard_library()
    for name in (name for name in CASES if {name, group_of(name)} & {*options.cases}):
        for seed in options.seeds:
            row = measure(name, Task(seed=seed, steps=options.steps), corpus)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}, seed {seed}: {row['diverged'] or row['held_out_loss']}", flush=True)
    page = summary(read(options.out))
    options.out.with_suffix(".md").write_text(f"Losses in nats per byte, in brackets their ratios.\n\n{page}\n")
    print(page)


if __name__ == "__main__":
    main()
