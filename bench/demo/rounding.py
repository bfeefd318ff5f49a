"""What storing IF-Shampoo's factors in BF16 costs, by rounding mode, on the demo's model.

    python -m bench.demo.rounding [--set demo|slow] [--seeds 0 1] [--steps N]

Trains the demo's task with fp32 factors and with BF16 factors in every rounding mode: same weights, same
data order, same settings. The set "demo" has the demo's own settings; "slow" has a small ``beta2``, where
round-to-nearest stalls, because a step no longer moves a factor's diagonal by half a BF16 unit. Adds its rows to
bench/results/rounding-<date>.json and writes the same numbers as a Markdown table next to it.
"""

import argparse
import datetime
import json
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.common.paths import RESULTS
from bench.common.record import provenance
from bench.demo.__main__ import CHOSEN, Task, standard_library, train

MODES: dict[str, dict[str, Any]] = {
    "fp32": {"factor_dtype": torch.float32},
    "bf16, stochastic": {"factor_dtype": torch.bfloat16, "rounding": "stochastic"},
    "bf16, compensated": {"factor_dtype": torch.bfloat16, "rounding": "compensated"},
    "bf16, nearest": {"factor_dtype": torch.bfloat16, "rounding": "nearest"},
}

# With factors that learn slowly the update stays small, hence the larger lr.
SETS: dict[str, dict[str, Any]] = {"demo": {}, "slow": {"beta2": 0.02, "lr": 1e-3}}


def measure(mode: str, settings: dict[str, Any], task: Task, seeds: list[int]) -> dict[str, Any]:
    """The losses of one mode, by seed and their means."""
    data, row = standard_library(), {"factors": mode, "task": asdict(task), "seeds": seeds, "settings": settings}
    settings = settings | MODES[mode]
    runs = [train("ifshampoo", settings, replace(task, seed=seed), data, evaluations=1)[0] for seed in seeds]
    for name in ("final_train_loss", "held_out_loss"):
        losses = [getattr(run, name) for run in runs]
        row[name], row[f"{name}_by_seed"] = sum(losses) / len(losses), losses
    return row | {"state_bytes": runs[0].state_bytes}


def markdown(sets: dict[str, list[dict[str, Any]]]) -> str:
    """A table a set, the losses with their ratios to those of fp32 factors."""
    lines = ["Losses in nats per byte, in brackets their ratios to fp32 factors."]
    for name, rows in sets.items():
        settings = ", ".join(f"{key} {value}" for key, value in rows[0]["settings"].items())
        seeds, steps = rows[0]["seeds"], rows[0]["task"]["steps"]
        lines += [
            "",
            f"`python -m bench.demo.rounding --set {name}`: {steps} steps, mean of seeds {seeds}, {settings}",
            "",
        ]
        lines += ["| factors | final train loss | held-out loss | optimizer state |", "| --- | --- | --- | --- |"]
        for row in rows:
            names = ("final_train_loss", "held_out_loss")
            losses = " | ".join(f"{row[key]:.3f} ({row[key] / rows[0][key]:.3f})" for key in names)
            lines.append(f"| {row['factors']} | {losses} | {row['state_bytes'] / 1e6:.1f} MB |")
    return "\n".join(lines) + "\n"


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Put the rows of the set ``name`` into today's record and rewrite its table."""
    path = RESULTS / f"rounding-{datetime.date.today()}.json"
    record = json.loads(path.read_text()) if path.exists() else {"sets": {}}
    record["sets"][name] = [{**row, **provenance(f"python -m bench.demo.rounding --set {name}")} for row in rows]
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record["sets"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=Task().steps)
    options = parser.parse_args()
    task, rows = Task(steps=options.steps), []
    for mode in MODES:
        rows.append(measure(mode, CHOSEN["ifshampoo"] | SETS[options.set], task, options.seeds))
        print(rows[-1], flush=True)
    write(options.set, rows)


if __name__ == "__main__":
    main()
