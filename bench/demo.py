"""Train a small byte-level GPT on Python's own standard library with several optimizers, side by side.

    python -m bench.demo [--steps N] [--seed N] [--out DIR] [--optimizers adamw ifshampoo ...]

Every optimizer starts from the same weights and sees the same batches in the same order. The run
prints a table, writes ``summary.json`` and ``loss.png`` to ``--out`` and samples text from the best model.
"""

import argparse
import hashlib
import math
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import Tensor, nn

from bench.demo_peers import MODULES, PEER_METHODS
from bench.demo_report import Run, plot, table_of, write_summary
from bench.memory import state_bytes
from bench.peers import why_missing
from bench.record import provenance
from rootfree_kernels import IFShampoo, RFRMSProp

METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "rfrmsprop": RFRMSProp,
    "ifshampoo": IFShampoo,
}

# Found with the same budget for each: `python -m bench.tune_demo --method NAME` (bench/results/demo-tuning.json).
CHOSEN: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 2.48e-3, "betas": (0.9, 0.9797), "weight_decay": 0.0168},
    "rfrmsprop": {"lr": 1.79e-4, "beta2": 0.0829, "damping": 3.35e-5},
    "ifshampoo": {"lr": 7.21e-5, "beta2": 0.753, "riemannian_momentum": 0.203, "damping": 2.23e-5},
    "shampoo": {"lr": 4.21e-3, "betas": (0.9, 0.9856), "weight_decay": 0.0216, "T": 3},
    "muon": {"lr": 2.23e-2, "adamw_lr": 3.02e-3, "weight_decay": 0.234},
}


@dataclass(frozen=True)
class Task:
    """What is trained, and for how long. One batch is ``batch`` sequences of ``length`` bytes."""

    steps: int = 400
    warmup: int = 20
    batch: int = 16
    length: int = 128
    width: int = 128
    layers: int = 5
    seed: int = 0


def standard_library() -> tuple[Tensor, Tensor]:
    """The standard library's sources as (train, held-out) bytes; the hash of a file's name picks its side.

    Left out: what is not part of every installation (tests, IDLE, installed packages) and files that are
    tables rather than code (codecs, pydoc's topics).
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "encodings",
        "pydoc_data",
    }
    sides: tuple[bytearray, bytearray] = (bytearray(), bytearray())
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if left_out.isdisjoint(name.parts):
            held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 26  # about one file in ten
            sides[held_out].extend(path.read_bytes())
    return torch.frombuffer(sides[0], dtype=torch.uint8), torch.frombuffer(sides[1], dtype=torch.uint8)


def batches(data: Tensor, count: int, task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` batches of (inputs, targets), each [batch, length], from places that ``seed`` decides."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(data) - task.length, (task.batch, 1), generator=generator)
        window = data[starts + torch.arange(task.length + 1)].long()
        yield window[:, :-1], window[:, 1:]


class Block(nn.Module):
    """Pre-norm causal attention, then a pre-norm MLP of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 32)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        maps = (self.query, self.key, self.value)
        query, key, value = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in maps)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes [batch, length] to logits [batch, length, 256]."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, task.width), nn.Embedding(task.length, task.width)
        self.blocks = nn.Sequential(*(Block(task.width) for _ in range(task.layers)))
        self.norm, self.head = nn.RMSNorm(task.width), nn.Linear(task.width, 256, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = 0.02 if name in ("bytes.weight", "places.weight") else weight.shape[1] ** -0.5
                into_residual = name.endswith(("mix.weight", "down.weight"))
                nn.init.normal_(weight, std=std / math.sqrt(2 * task.layers) if into_residual else std)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.bytes(x) + self.places.weight[: x.shape[1]])))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def sample(self, prompt: str, count: int, seed: int, temperature: float = 0.7) -> str:
        """``prompt`` and ``count`` bytes after it."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.tensor([list(prompt.encode())])
        for _ in range(count):
            logits = self(text[:, -len(self.places.weight) :])[:, -1] / temperature
            text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
        return bytes(text[0].tolist()).decode(errors="replace")


def make_optimizer(method: str, model: nn.Module, task: Task, **settings: Any) -> torch.optim.Optimizer:
    """``method`` on all of the model's weights. The root-free methods count a sequence as one loss term."""
    if method in PEER_METHODS:
        return PEER_METHODS[method](model, **settings)
    if method != "adamw":
        settings["batch_size"] = task.batch
    return METHODS[method](model.parameters(), **settings)


def warmup_cosine(step: int, task: Task) -> float:
    """The learning rate's factor: up in a line over the warm-up, then down to 0 along a cosine."""
    warmup = min(task.warmup, task.steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, task.steps - warmup)))


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
) -> tuple[Run, GPT]:
    """Train a fresh model; ``report(step, loss)`` hears of every step.

    Weights and data order follow from ``task.seed``. Held-out loss is taken ``evaluations`` times, the last
    at the end, always on the same 16 batches. Raises FloatingPointError on divergence.
    """
    torch.manual_seed(task.seed)
    model, run = GPT(task), Run()
    optimizer = make_optimizer(method, model, task, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, task))
    held_out = list(batches(data[1], 16, task, seed=0))
    for step, batch in enumerate(batches(data[0], task.steps, task, seed=task.seed + 1), start=1):
        loss = timed_step(model, optimizer, batch, run)
        if not math.isfinite(loss):
            raise FloatingPointError(f"{method} with {settings}: the loss is {loss} at step {step}")
        schedule.step()
        report(step, loss)
        if step == task.steps or step % math.ceil(task.steps / evaluations) == 0:
            run.held_out[step] = evaluate(model, held_out)
            run.held_out_seconds[step] = run.seconds
    run.state_bytes = state_bytes(optimizer, model.parameters())
    return run, model


def timed_step(model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], run: Run) -> float:
    """One training step, its loss and times noted in ``run``; returns the loss before the step."""
    begin = time.perf_counter()
    loss = model.loss(*batch)
    optimizer.zero_grad()
    loss.backward()
    before_update = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    run.train.append(loss.item())
    run.seconds += end - begin
    run.optimizer_seconds += end - before_update
    return run.train[-1]


def train_with_bar(method: str, task: Task, data: tuple[Tensor, Tensor]) -> tuple[Run, GPT]:
    """Train with the chosen settings under a progress bar that shows the loss."""
    columns = (TextColumn(f"{method:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        bar = progress.add_task(method, total=task.steps, loss=math.nan)

        def report(step: int, loss: float) -> None:
            progress.update(bar, completed=step, loss=loss)

        return train(method, CHOSEN[method], task, data, report)


def parse() -> tuple[argparse.Namespace, Task]:
    """The command line's options, and the task they describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", choices=CHOSEN, default=list(METHODS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    for name, default in asdict(Task()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    options = parser.parse_args()
    for method in options.optimizers:
        if method in MODULES and (problem := why_missing(MODULES[method])):
            parser.error(f"--optimizers {method}: {problem}")
    return options, Task(**{name: getattr(options, name) for name in asdict(Task())})


def main() -> None:
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
