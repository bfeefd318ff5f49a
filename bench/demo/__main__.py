"""Train a small byte-level GPT on Python's own standard library with several optimizers, side by side.

    python -m bench.demo [--steps N] [--seed N] [--out DIR] [--optimizers adamw ifshampoo ...]

Every optimizer starts from the same weights and sees the same batches in the same order. The run
prints a table, writes ``summary.json`` and ``loss.png`` to ``--out`` and samples text from the best model.

    python -m bench.demo --device cuda --size 30m|124m --seconds 60

trains a larger model of the same kind on a GPU instead: ``--size`` and ``--device cuda`` are options of
`bench.demo.language`, whose ``--help`` has the others.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.memory import state_bytes
from bench.common.peers import why_missing
from bench.common.record import provenance
from bench.demo import language as language_model
from bench.demo.model import GPT, Task, batches, standard_library, warmup_cosine
from bench.demo.peers import MODULES, PEER_METHODS
from bench.demo.report import Run, plot, table_of, write_summary
from rootfree_kernels import IFShampoo, RFRMSProp

METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "rfrmsprop": RFRMSProp,
    "ifshampoo": IFShampoo,
}
"""Optimizers that take all of the model's weights. `ifshampoo` follows the paper's rule, `recipe` the recipe."""

SHOWN = ("adamw", "muon", "recipe")
"""The optimizers that are trained if none are asked for."""

# Found by `python -m bench.demo.tune --method NAME` (bench/results/demo-tuning.json), with as many trials for each.
# Muon had more, and the recipe fewer.
CHOSEN: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 2.48e-3, "betas": (0.9, 0.9797), "weight_decay": 0.0168},
    "rfrmsprop": {"lr": 1.79e-4, "beta2": 0.0829, "damping": 3.35e-5},
    "ifshampoo": {"lr": 7.21e-5, "beta2": 0.753, "riemannian_momentum": 0.203, "damping": 2.23e-5},
    "shampoo": {"lr": 4.21e-3, "betas": (0.9, 0.9856), "weight_decay": 0.0216, "T": 3},
    "muon": {"lr": 4.5e-2, "adamw_lr": 3.02e-3, "weight_decay": 0.234, "momentum": 0.9},
    "recipe": {"lr": 4.5e-2, "weight_decay": 0.234},
}


def make_optimizer(method: str, model: nn.Module, task: Task, **settings: Any) -> torch.optim.Optimizer:
    """``method`` on all of the model's weights. The root-free methods count a sequence as one loss term."""
    if method in PEER_METHODS:
        return PEER_METHODS[method](model, **settings)
    if method == "recipe":
        return IFShampoo.for_model(model, **settings)
    if method != "adamw":
        settings["batch_size"] = task.batch
    return METHODS[method](model.parameters(), **settings)


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The mean loss over ``batches``."""
    losses = [model.loss(*batch).item() for batch in batches]
    return sum(losses) / len(losses)


def train(
    method: str,
    settings: dict[str, Any],
    task: Task,
    data: tuple[Tensor, Tensor],
    report: Callable[[int, float], object] = lambda step, loss: None,
    evaluations: int = 10,
    clip: float | None = None,
) -> tuple[Run, GPT]:
    """Train a fresh model; ``report(step, loss)`` hears of every step. Gradients are clipped to the norm ``clip``.

    Weights and data order follow from ``task.seed``. Held-out loss is taken ``evaluations`` times, the last
    at the end, always on the same 16 batches. Raises FloatingPointError on divergence.
    """
    torch.manual_seed(task.seed)
    model, run = GPT(task), Run()
    optimizer = make_optimizer(method, model, task, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, task))
    held_out = list(batches(data[1], 16, task, seed=0))
    for step, batch in enumerate(batches(data[0], task.steps, task, seed=task.seed + 1), start=1):
        loss = timed_step(model, optimizer, batch, run, clip)
        if not math.isfinite(loss):
            raise FloatingPointError(f"{method} with {settings}: the loss is {loss} at step {step}")
        schedule.step()
        report(step, loss)
        if step == task.steps or step % math.ceil(task.steps / evaluations) == 0:
            run.held_out[step] = evaluate(model, held_out)
            run.held_out_seconds[step] = run.seconds
    run.state_bytes = state_bytes(optimizer, model.parameters())
    return run, model


def timed_step(
    model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], run: Run, clip: float | None = None
) -> float:
    """One training step, its loss and times noted in ``run``; returns the loss before the step."""
    begin = time.perf_counter()
    loss = model.loss(*batch)
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    before_update = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    run.train.append(loss.item())
    run.seconds += end - begin
    run.optimizer_seconds += end - before_update
    return run.train[-1]


def train_with_bar(method: str, task: Task, data: tuple[Tensor, Tensor]) -> tuple[Run, GPT]:
    """Train with the chosen settings under a progress bar that shows the loss."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(f"{method:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        bar = progress.add_task(method, total=task.steps, loss=math.nan)

        def report(step: int, loss: float) -> None:
            progress.update(bar, completed=step, loss=loss)

        return train(method, CHOSEN[method], task, data, report)


def parse() -> tuple[argparse.Namespace, Task]:
    """The command line's options, and the task they describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", choices=CHOSEN, default=list(SHOWN), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="cuda: see bench.demo.language")
    for name, default in asdict(Task()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    options = parser.parse_args()
    for method in options.optimizers:
        if method in MODULES and (problem := why_missing(MODULES[method])):
            parser.error(f"--optimizers {method}: {problem}")
    return options, Task(**{name: getattr(options, name) for name in asdict(Task())})


def main() -> None:
    if language_model.is_asked_for(sys.argv[1:]):
        sys.exit(language_model.main(sys.argv[1:]))
    # Imported late: a machine with a GPU need not have rich to train the larger model.
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    options, task = parse()
    console, data = Console(), standard_library()
    weights = sum(weight.numel() for weight in GPT(task).parameters())
    console.print(f"{weights:,} weights, {len(data[0]):,} bytes to train on, {len(data[1]):,} held out")
    runs, models = {}, {}
    for method in options.optimizers:
        runs[method], models[method] = train_with_bar(method, task, data)
    console.print(table_of(runs))
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        **provenance(shlex.join(["python", "-m", "bench.demo", *sys.argv[1:]])),
        "settings": {method: CHOSEN[method] for method in runs},
        "task": asdict(task),
        "bytes": {"train": len(data[0]), "held_out": len(data[1])},
    }
    write_summary(options.out / "summary.json", runs, about)
    plot(runs, options.out / "loss.png")
    best = min(runs, key=lambda method: runs[method].held_out_loss)
    text = models[best].sample("def ", 300, task.seed)
    console.print(Panel(Text(text), title=f"written by the model of {best}"))
    console.print(f"Wrote {options.out / 'summary.json'} and {options.out / 'loss.png'}")


if __name__ == "__main__":
    main()
