"""Train the model of the demo by the recipe with several seeds, dtypes of factors and clips, and the same settings.

    python -m bench.demo.variants [--seeds 0 1 2] [--cases NAME ...]

Every run is one line of bench/results/recipe-<date>.jsonl and of the table that is printed. The settings are those of
`bench.demo`, found on seed 0.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from typing import Any, NamedTuple

import torch

from bench.common.paths import RESULTS
from bench.common.record import provenance
from bench.demo.__main__ import CHOSEN, Task, standard_library, train


class Case(NamedTuple):
    """A way to train: the method, what differs from its chosen settings, and the norm that clips gradients."""

    method: str
    changes: dict[str, Any]
    clip: float | None = None


WHITENED = {"direction": "whitened", "damping": 1e-8}
FP32 = {"factor_dtype": torch.float32}
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
}


def run(name: str, seed: int) -> dict[str, Any]:
    """Train once, append the result to the record, and return it."""
    case, task = CASES[name], Task(seed=seed)
    settings = {**CHOSEN[case.method], **case.changes}
    trained, _ = train(case.method, settings, task, standard_library(), evaluations=1, clip=case.clip)
    result = {
        "case": name,
        "seed": seed,
        "held_out_loss": round(trained.held_out_loss, 4),
        "optimizer_share": round(trained.optimizer_share, 4),
        "state_bytes": trained.state_bytes,
        "settings": {key: str(value) for key, value in settings.items()},
        "clip": case.clip,
        **provenance(shlex.join(["python", "-m", "bench.demo.variants", *sys.argv[1:]])),
    }
    with (RESULTS / f"recipe-{datetime.date.today().isoformat()}.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    for name in options.cases:
        losses = [run(name, seed)["held_out_loss"] for seed in options.seeds]
        print(f"{name:35} {sum(losses) / len(losses):.4f}   {losses}", flush=True)


if __name__ == "__main__":
    main()
