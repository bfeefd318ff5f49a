"""Train the demo's small model by variants of its methods: dtypes of factors, rounding, directions, clipped gradients.

    python -m bench.demo.variants [--cases NAME ...] [--seeds 0 1 2] [--steps N]
    python -m bench.demo.variants --cases rounding slow-rounding --seeds 0 1

Settings are those of `bench.demo`, found on seed 0. The cases named "rounding: …" store IF-Shampoo's factors in every
way; those named "slow-rounding: …" do so with a small `beta2`, at which rounding to nearest stalls, because a step no
longer moves a factor's diagonal by half a BF16 unit. A name before a colon stands for all of its cases.

Every run is a line of bench/results/variants-<date>.jsonl. A table of all lines is printed and written beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common.paths import RESULTS
from bench.common.record import provenance
from bench.common.report import table
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
    "recipe": Case("recipe", {}),
    "recipe, FP32 factors": Case("recipe", FP32),
    "recipe, compensated BF16 factors": Case("recipe", {"rounding": "compensated"}),
    "recipe, root-free direction": Case("recipe", {"direction": "root_free", "damping": 1e-3}),
    "recipe, root-free matrices": Case("recipe", {"direction": "root_free", "damping": 1e-3, "rest": WHITENED}),
    "recipe, clipped at 1": Case("recipe", {}, clip=1.0),
    "recipe, clipped at 0.01, always": Case("recipe", {}, clip=0.01),
    "recipe, T = 2": Case("recipe", {"precondition_frequency": 2}),
    "recipe, least memory": Case("recipe", {"packed_momentum": True, "state_dtype": torch.bfloat16}),
    **{f"rounding: {name}": Case("ifshampoo", changes) for name, changes in ROUNDING.items()},
    **{f"slow-rounding: {name}": Case("ifshampoo", {**SLOW, **changes}) for name, changes in ROUNDING.items()},
}


def group_of(name: str) -> str:
    """Return the part of a case's name before the colon, or all of it."""
    return name.partition(":")[0]


GROUPS = dict.fromkeys(map(group_of, CASES))


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


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a line for each case and number of steps: mean losses, and their ratios to those of the first
    case of its group."""
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["held_out_loss"] is not None:
            groups.setdefault((row["task"]["steps"], row["case"]), []).append(row)
    losses = ("final_train_loss", "held_out_loss")
    means = {
        key: [sum(row[loss] for row in of_case) / len(of_case) for loss in losses] for key, of_case in groups.items()
    }
    lines = []
    for (steps, case), values in means.items():
        first = next(means[key] for key in means if key[0] == steps and group_of(key[1]) == group_of(case))
        cells = [f"{mean:.4f} ({mean / other:.3f})" for mean, other in zip(values, first, strict=True)]
        of_case = groups[steps, case]
        seeds = " ".join(str(row["seed"]) for row in of_case)
        lines.append([case, str(steps), seeds, *cells, f"{of_case[0]['state_bytes'] / 1e6:.1f} MB"])
    return "\n".join(table(["case", "steps", "seeds", "final train loss", "held-out loss", "optimizer state"], lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*{**CASES, **GROUPS}], default=[*CASES], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Task().steps)
    parser.add_argument("--out", type=Path, default=RESULTS / f"variants-{datetime.date.today()}.jsonl")
    options = parser.parse_args()
    corpus = standard_library()
    for name in (name for name in CASES if {name, group_of(name)} & {*options.cases}):
        for seed in options.seeds:
            row = measure(name, Task(seed=seed, steps=options.steps), corpus)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}, seed {seed}: {row['held_out_loss']}", flush=True)
    page = summary([json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()])
    options.out.with_suffix(".md").write_text(f"Losses in nats per byte, in brackets their ratios.\n\n{page}\n")
    print(page)


if __name__ == "__main__":
    main()
