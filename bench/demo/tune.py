"""Tune each of the demo's optimizers with the same small budget.

    python -m bench.demo.tune --method adamw|rfrmsprop|ifshampoo|recipe|shampoo|muon [--trials 12] [--finalists 3]
    python -m bench.demo.tune --method muon --settings '{"lr": 0.045, …}'     # these settings alone, at full length

Each method gets the same number of settings, spread over its space by a scrambled Sobol sequence. Each is trained for
half of the demo's steps with the demo's schedule; the best few are trained again in full. Every result is appended to
bench/results/demo-tuning.json. Each space is centred on settings known to work on small models of this kind, and spans
a factor of ten and more in `lr`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.common.paths import RESULTS
from bench.common.record import provenance, read_json, write_text
from bench.demo.data import Corpus, standard_library
from bench.demo.settings import Task
from bench.demo.train import Session, Trainee, train

RECORD = RESULTS / "demo-tuning.json"

# name: (low, high), sampled uniformly in the logarithm. "sgd_step" is lr / (damping (1 - momentum)), the step
# of the plain SGD that a root-free method falls back to where gradients are small; it fixes the damping.
ADAM = {"lr": (7e-4, 1e-2), "1 - beta2": (2e-3, 1e-1), "weight_decay": (1e-3, 3e-1)}
SPACES: dict[str, dict[str, tuple[float, float]]] = {
    "adamw": ADAM,
    "rfrmsprop": {"lr": (3e-5, 5e-4), "beta2": (0.05, 0.95), "sgd_step": (5.0, 80.0)},
    "ifshampoo": {
        "lr": (7e-5, 7e-4),
        "beta2": (0.3, 0.95),
        "sgd_step": (10.0, 80.0),
        "riemannian_momentum": (0.02, 0.6),
    },
    "shampoo": {**ADAM, "T": (1, 20)},
    "muon": {"lr": (1e-3, 5e-2), "adamw_lr": (7e-4, 1e-2), "weight_decay": (1e-3, 3e-1)},
    "recipe": {"lr": (1e-2, 1.6e-1), "weight_decay": (3e-2, 1.0)},
}


def arguments_of(point: dict[str, float]) -> dict[str, Any]:
    """Return the optimizer's arguments at a point of its space."""
    settings: dict[str, Any] = dict(point)
    if "1 - beta2" in settings:
        settings["betas"] = (0.9, 1 - settings.pop("1 - beta2"))
    if "T" in settings:
        settings["T"] = round(settings["T"])
    if "sgd_step" in settings:
        settings["damping"] = float(f"{settings['lr'] / (settings.pop('sgd_step') * (1 - 0.9)):.3g}")
    return settings


def points(method: str, trials: int) -> list[dict[str, float]]:
    """Return the first points of the method's Sobol sequence, to three digits."""
    space = SPACES[method]
    low, high = torch.tensor(list(space.values()), dtype=torch.float64).T
    unit = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0).draw(trials)
    values = (low * (high / low) ** unit).tolist()
    return [{name: float(f"{value:.3g}") for name, value in zip(space, row, strict=True)} for row in values]


def trial(method: str, settings: dict[str, Any], task: Task, corpus: Corpus) -> dict[str, Any]:
    """Train once, append the result to the record, and return it. The loss of a run that diverged is null."""
    result: dict[str, Any] = {"method": method, "settings": settings, "task": asdict(task)}
    run = train(Trainee(method, settings, Session(task, corpus, evaluations=1)))
    if run.diverged:
        result |= {"held_out_loss": None, "diverged": run.diverged}
    else:
        result |= {name: round(value, 4) for name, value in run.figures().items()}
    result |= provenance(shlex.join(["python", "-m", "bench.demo.tune", *sys.argv[1:]]))
    rows = read_json(RECORD) if RECORD.exists() else []
    write_text(RECORD, "[\n" + ",\n".join(json.dumps(row) for row in [*rows, result]) + "\n]\n")
    print(method, task.steps, result["held_out_loss"], settings, flush=True)
    return result


def loss_of(result: dict[str, Any]) -> float:
    """Return the held-out loss, infinite for a run that diverged."""
    return math.inf if result["held_out_loss"] is None else result["held_out_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, choices=SPACES)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--settings", type=json.loads, help="a JSON object of the optimizer's arguments")
    options = parser.parse_args()
    task, corpus = Task(), standard_library()
    if options.settings:
        trial(options.method, options.settings, task, corpus)
        return
    short = replace(task, steps=task.steps // 2)
    candidates = [arguments_of(point) for point in points(options.method, options.trials)]
    results = [trial(options.method, settings, short, corpus) for settings in candidates]
    finalists = sorted(results, key=loss_of)[: options.finalists]
    best = min((trial(options.method, result["settings"], task, corpus) for result in finalists), key=loss_of)
    print("best:", best["held_out_loss"], best["settings"])


if __name__ == "__main__":
    main()
