"""What storing IF-Shampoo's factors in BF16 costs, by rounding mode, on the demo's model.

    python -m bench.rounding [--seeds 0 1] [--steps N] [--beta2 ...]

Trains the demo's task with fp32 factors and with BF16 factors in every rounding mode: same weights, same
data order, same settings. The first set of rows has the demo's own settings; the second, a small ``beta2``,
shows round-to-nearest stall, because a step no longer moves a factor's diagonal by half a BF16 unit. Writes
bench/results/rounding-<date>.json and the same numbers as a Markdown table next to it.
"""

import argparse
import datetime
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.demo import CHOSEN, Task, standard_library, train

RESULTS = Path(__file__).parent / "results"

MODES: dict[str, dict[str, Any]] = {
    "fp32": {"factor_dtype": torch.float32},
    "bf16, stochastic": {"factor_dtype": torch.bfloat16, "rounding": "stochastic"},
    "bf16, compensated": {"factor_dtype": torch.bfloat16, "rounding": "compensated"},
    "bf16, nearest": {"factor_dtype": torch.bfloat16, "rounding": "nearest"},
}


def measure(beta2: float, seeds: list[int], task: Task, data: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """One row a mode: the losses of every seed, their means, and the means' ratios to those of fp32."""
    rows: list[dict[str, Any]] = []
    for mode, settings in MODES.items():
        settings = CHOSEN["ifshampoo"] | {"beta2": beta2} | settings
        runs = [
            train("ifshampoo", settings, replace(task, seed=seed), data, evaluations=1)[0] for seed in seeds
        ]
        row: dict[str, Any] = {"factors": mode, "beta2": beta2, "state_bytes": runs[0].state_bytes}
        for name in ("final_train_loss", "held_out_loss"):
            losses = [getattr(run, name) for run in runs]
            row[f"{name}_by_seed"], row[name] = losses, sum(losses) / len(losses)
            row[f"{name}_to_fp32"] = row[name] / (rows[0] if rows else row)[name]
        print(row, flush=True)
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], seeds: list[int], task: Task) -> str:
    """The rows as a table, losses averaged over the seeds."""
    lines = [
        f"The demo's model, {task.steps} steps of IFShampoo, mean of seeds {seeds}; losses in nats per byte,",
        "in brackets their ratios to fp32 factors. Made by `python -m bench.rounding`.",
        "",
        "| β₂ | factors | final train loss | held-out loss | optimizer state |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        names = ("final_train_loss", "held_out_loss")
        losses = " | ".join(f"{row[name]:.3f} ({row[f'{name}_to_fp32']:.3f})" for name in names)
        lines.append(f"| {row['beta2']} | {row['factors']} | {losses} | {row['state_bytes'] / 1e6:.1f} MB |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=Task().steps)
    parser.add_argument("--beta2", type=float, nargs="+", default=[CHOSEN["ifshampoo"]["beta2"], 0.05])
    options = parser.parse_args()
    task, data = Task(steps=options.steps), standard_library()
    rows = [row for beta2 in options.beta2 for row in measure(beta2, options.seeds, task, data)]
    record = {
        "rows": rows,
        "settings": CHOSEN["ifshampoo"],
        "task": asdict(task),
        "seeds": options.seeds,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    path = RESULTS / f"rounding-{datetime.date.today()}"
    path.with_suffix(".json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    path.with_suffix(".md").write_text(markdown(rows, options.seeds, task))


if __name__ == "__main__":
    main()
