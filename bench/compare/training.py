"""Whole training steps: a GPT on random tokens, forward, backward and step, with one optimizer after another.

On a GPU GPT-2 124M in BF16 autocast with 32 × 1024 tokens, on a CPU the small GPT of `bench.demo`. Second-order
optimizers and Muon step the matrices of the layers; embeddings and vectors take AdamW beside theirs, and the diagonal
step of the same optimizer beside ours. Contestants have models of their own; on a CPU they take turns, step by step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from bench.common.gpt import GPT, GPT2
from bench.common.memory import peak_bytes, release, state_bytes
from bench.common.optimizers import ENTRIES, Entry
from bench.common.timing import Timing
from bench.demo.methods import Together
from rootfree_kernels import IFShampoo


@dataclass(frozen=True)
class Task:
    """A model and what is fed to it."""

    name: str
    model: GPT2
    batch: int
    bf16: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.model.context


GPT2_124M = Task("GPT-2 124M", GPT2(), batch=32)
SMALL = Task("small GPT", GPT2(5, 128, vocabulary=256, context=128, head_width=32), batch=16, bf16=False)


class Transformer(GPT):
    """A GPT-2 that maps tokens [batch, length] to the mean loss of the next token."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.model)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


# ---- optimizers --------------------------------------------------------------------------------------------------


def whole(entry: Entry, model: Transformer, period: int) -> Optimizer:
    """One optimizer for the whole model."""
    return entry.make([*model.parameters()], period, 1024)


def in_groups(entry: Entry, model: Transformer, period: int) -> Optimizer:
    """Ours, with the diagonal step for embeddings and vectors."""
    groups = [{"params": model.matrices()}, {"params": model.rest(), "structure": "elementwise"}]
    return entry.make(groups, period, 1024)


def by_recipe(entry: Entry, model: Transformer, period: int) -> Optimizer:
    """The recipe for the whole model, as `IFShampoo.for_model` splits it."""
    options = {"precondition_frequency": period, "max_preconditioner_dim": 1024, **entry.make.keywords}
    return IFShampoo.for_model(model, **options)


def beside_adamw(entry: Entry, model: Transformer, period: int) -> Optimizer:
    """Theirs for the matrices, AdamW for the rest."""
    adamw = torch.optim.AdamW(model.rest(), lr=1e-4, fused=True)
    return Together(entry.make(model.matrices(), period, 1024), adamw)


ALWAYS, SELDOM = 1, 10

ROWS: dict[str, tuple[str, int, Callable[[Entry, Transformer, int], Optimizer]]] = {
    "AdamW, fused": ("AdamW, fused", ALWAYS, whole),
    "SGD, fused": ("SGD, fused", ALWAYS, whole),
    "RFRMSProp": ("RFRMSProp", ALWAYS, whole),
    "IFShampoo, T = 1": ("IFShampoo", ALWAYS, in_groups),
    "IFShampoo, T = 10": ("IFShampoo", SELDOM, in_groups),
    "IFShampoo, T = 10, embeddings too": ("IFShampoo", SELDOM, whole),
    "IFShampoo, FP32 factors, T = 10": ("IFShampoo, FP32 factors", SELDOM, in_groups),
    "IFShampoo, recipe": ("IFShampoo, recipe", ALWAYS, by_recipe),
    "Muon of torch": ("Muon of torch", ALWAYS, beside_adamw),
    "Muon of Dion, Triton": ("Muon of Dion, Triton", ALWAYS, beside_adamw),
    "Distributed Shampoo, eigh, T = 10": ("Distributed Shampoo, eigh, unpacked", SELDOM, beside_adamw),
    "Distributed Shampoo, Newton, T = 10": ("Distributed Shampoo, Newton, unpacked", SELDOM, beside_adamw),
    "sirfshampoo, T = 10": ("sirfshampoo", SELDOM, beside_adamw),
    "SOAP, T = 10": ("SOAP", SELDOM, beside_adamw),
}
"""By what a row is called: the entry, T, and which part of the model it steps."""

BASELINE = "AdamW, fused"
"""The row that the others are compared with."""


# ---- measuring ---------------------------------------------------------------------------------------------------


@dataclass
class Trainee:
    """A model with its optimizer."""

    task: Task
    device: torch.device
    make: Callable[[Transformer], Optimizer]
    period: int
    steps: list[float] = field(default_factory=list)
    in_optimizer: list[float] = field(default_factory=list)
    peak: int = 0

    def prepare(self) -> None:
        torch.manual_seed(0)
        self.model = Transformer(self.task).to(self.device)
        self.optimizer = self.make(self.model)

    def warm_up(self, tokens: Tensor, clock: Any, number: int) -> None:
        """A step whose memory is taken down where it may be an update, and not its time."""
        if number % SELDOM in (0, SELDOM - 1):
            params = [*self.model.parameters()]
            kept = sum(x.nbytes for x in params) + state_bytes(self.optimizer, params)
            self.peak = max(self.peak, kept + peak_bytes(partial(self.step, tokens, clock), self.device))
        else:
            self.step(tokens, clock)
        self.steps.clear()
        self.in_optimizer.clear()

    def step(self, tokens: Tensor, clock: Any) -> None:
        clock.synchronize()
        marks = [clock.mark()]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.task.bf16):
            loss = self.model(tokens)
        loss.backward()
        marks.append(clock.mark())
        self.optimizer.step()
        marks.append(clock.mark())
        self.optimizer.zero_grad()
        clock.synchronize()
        self.steps.append(clock.elapsed(marks[0], marks[2]))
        self.in_optimizer.append(clock.elapsed(marks[1], marks[2]))

    def row(self) -> dict[str, Any]:
        """Means over whole cycles of T: an update belongs to them as often as it comes."""
        steps, in_optimizer = self.steps, self.in_optimizer
        mean, share = sum(steps) / len(steps), sum(in_optimizer) / sum(steps)
        return {
            "mean": mean,
            "spread": Timing.of(steps)._asdict(),
            "optimizer_share": share,
            "in_optimizer": sum(in_optimizer) / len(in_optimizer),
            "tokens_per_second": self.task.tokens / mean * 1e6,
            "state_bytes": state_bytes(self.optimizer, self.model.parameters()),
            "peak_bytes": self.peak,
        }


def names_of(device: torch.device, entries: Sequence[Entry]) -> list[str]:
    """Return the rows that these entries take part in."""
    chosen = ((name, ENTRIES[entry]) for name, (entry, _, _) in ROWS.items() if entry in ENTRIES)
    return [name for name, entry in chosen if entry in entries and device.type in entry.devices]


def contestants(task: Task, device: torch.device, names: Sequence[str]) -> dict[str, Trainee]:
    """Return the trainees of these rows."""
    found = {}
    for name in names:
        entry_name, period, part = ROWS[name]
        found[name] = Trainee(task, device, partial(_make, part, ENTRIES[entry_name], period), period)
    return found


def _make(part: Callable[..., Optimizer], entry: Entry, period: int, model: Transformer) -> Optimizer:
    return part(entry, model, period)


def batches(task: Task, device: torch.device) -> Iterator[Tensor]:
    """Random tokens, without end."""
    generator = torch.Generator(device=device).manual_seed(0)
    size = (task.batch, task.model.context)
    while True:
        yield torch.randint(task.model.vocabulary, size, generator=generator, device=device)


def measure(
    task: Task, clock: Any, device: torch.device, names: Sequence[str], cycles: tuple[int, int], deadline: float
) -> list[dict[str, Any]]:
    """Return a row for each name; times in µs. `cycles` of T = 10 warm up and are measured. On a GPU each trains alone,
    since its memory is measured; on a CPU they take turns."""
    rows = []
    trainees = contestants(task, device, names)
    alone = device.type == "cuda"
    for group in [{name: x} for name, x in trainees.items()] if alone else [trainees]:
        problems = _train(group, task, clock, device, cycles, deadline)
        for name, trainee in group.items():
            row = {"optimizer": name, "task": task.name}
            rows.append(row | ({"error": problems[name]} if name in problems else trainee.row()))
        for trainee in group.values():
            vars(trainee).pop("model", None), vars(trainee).pop("optimizer", None)
        release()
    return rows


def _train(
    group: dict[str, Trainee], task: Task, clock: Any, device: torch.device, cycles: tuple[int, int], deadline: float
) -> dict[str, str]:
    """Train for the cycles that warm up and for those that are measured; why one did not, by name."""
    problems: dict[str, str] = {}
    data = batches(task, device)
    for number in range(sum(cycles) * SELDOM):
        tokens = next(data)
        for name, trainee in list(group.items())[:: 1 if number % 2 else -1]:
            if name in problems:
                continue
            try:
                if time.perf_counter() > deadline:
                    raise TimeoutError("left out: the run's time was over")
                if number == 0:
                    trainee.prepare()
                if number < cycles[0] * SELDOM:
                    trainee.warm_up(tokens, clock, number)
                else:
                    trainee.step(tokens, clock)
            except Exception as error:  # of any kind: it is recorded, and the others go on
                problems[name] = f"{type(error).__name__}: {error}"
    return problems
