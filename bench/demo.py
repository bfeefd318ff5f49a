"""Train a small byte-level GPT on Python's own standard library with three optimizers, side by side.

    python -m bench.demo [--steps N] [--seed N] [--out DIR] [--optimizers adamw ifshampoo ...]

Every optimizer starts from the same weights and sees the same batches in the same order. The run
prints a table, writes ``summary.json`` and ``loss.png`` to ``--out`` and samples text from the best model.
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rootfree_kernels import IFShampoo, RFRMSProp

METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "rfrmsprop": RFRMSProp,
    "ifshampoo": IFShampoo,
}

CHOSEN: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 2.5e-3, "betas": (0.9, 0.99), "weight_decay": 0.1},
    "rfrmsprop": {"lr": 1e-4, "beta2": 0.05, "damping": 1e-4},
    "ifshampoo": {"lr": 1.9e-4, "beta2": 0.8, "damping": 3.7e-5, "riemannian_momentum": 0.02},
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


@dataclass
class Run:
    """What one optimizer did. Losses are in nats per byte, times in seconds without evaluations."""

    train: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    state_bytes: int = 0

    def summary(self) -> dict[str, float]:
        """The numbers of the table; the final train loss is the mean of the last tenth of the steps."""
        last = self.train[-max(1, len(self.train) // 10) :]
        return {
            "final_train_loss": sum(last) / len(last),
            "held_out_loss": self.held_out[len(self.train)],
            "steps_per_second": len(self.train) / self.seconds,
            "optimizer_share": self.optimizer_seconds / self.seconds,
            "state_bytes": self.state_bytes,
        }


# ---------------------------------------------------------------------------------------------- data


def standard_library() -> tuple[Tensor, Tensor]:
    """The standard library's sources as (train, held-out) bytes; the hash of a file's name picks its side.

    Left out: what is not part of every installation (tests, IDLE, installed packages) and files that are
    tables rather than code (codecs, pydoc's topics).
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "encodings", "pydoc_data"}
    sides: tuple[bytearray, bytearray] = (bytearray(), bytearray())
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if left_out.isdisjoint(name.parts):
            held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 26  # about one file in ten
            sides[held_out].extend(path.read_bytes())
    return torch.frombuffer(sides[0], dtype=torch.uint8), torch.frombuffer(sides[1], dtype=torch.uint8)


def batches(data: Tensor, count: int, task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` batches of (inputs, targets), each [batch, length], from places that ``seed`` alone decides."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(data) - task.length, (task.batch, 1), generator=generator)
        window = data[starts + torch.arange(task.length + 1)].long()
        yield window[:, :-1], window[:, 1:]


# --------------------------------------------------------------------------------------------- model


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
        heads = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.mix(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
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


# ------------------------------------------------------------------------------------------ training


def make_optimizer(method: str, model: nn.Module, task: Task, **settings: Any) -> torch.optim.Optimizer:
    """``method`` on all of the model's weights. The root-free methods count a sequence as one loss term."""
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


def tensor_bytes(state: Any) -> int:
    """The bytes of all tensors in a (nested) optimizer state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(tensor_bytes, values))


def train(
    method: str,
    settings: dict[str, Any],
    task: Task,
    data: tuple[Tensor, Tensor],
    report: Callable[[int, float], object] = lambda step, loss: None,
    evaluations: int = 6,
) -> tuple[Run, GPT]:
    """Train a fresh model; ``report(step, loss)`` hears of every step.

    Weights and data order follow from ``task.seed``. Held-out loss is taken ``evaluations`` times, always on
    the same 16 batches, and at the end. Raises FloatingPointError on divergence.
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
        if step == task.steps or step % max(1, task.steps // evaluations) == 0:
            run.held_out[step] = evaluate(model, held_out)
    run.state_bytes = tensor_bytes(dict(optimizer.state))
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
