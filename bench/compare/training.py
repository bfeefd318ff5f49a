"""Measure whole training steps: forward, backward and step of a GPT on random tokens, with one optimizer after another.

The model is GPT-2 124M on a GPU, in BF16 autocast with 32 × 1024 tokens, and a small GPT-2 on a CPU. Second-order
optimizers and Muon step the matrices of the blocks. Embeddings and vectors take AdamW beside other people's optimizers,
and the diagonal step of the same optimizer beside ours. Every optimizer has its own model. On a CPU they take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bench.common.gpt import GPT, GPT2
from bench.common.memory import peak_bytes, release, state_bytes
from bench.common.optimizers import ADAMW, ENTRIES, Entry
from bench.common.timing import Timing
from bench.common.together import Together
from rootfree_kernels import IFShampoo


@dataclass(frozen=True)
class Task:
    """A model and the batches that it is trained on."""

    name: str
    model: GPT2
    batch: int
    bf16: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.model.context


GPT2_124M = Task("GPT-2 124M", GPT2(), batch=32)
SMALL = Task("small GPT", GPT2(5, 128, vocabulary=256, context=128, head_width=32), batch=16, bf16=False)


# ---- optimizers --------------------------------------------------------------------------------------------------


def whole(entry: Entry, model: GPT, period: int) -> Optimizer:
    """Return one optimizer for the whole model."""
    return entry.make([*model.parameters()], period, 1024)


def in_groups(entry: Entry, model: GPT, period: int) -> Optimizer:
    """Return ours, with the diagonal step for embeddings and vectors."""
    groups = [{"params": model.matrices()}, {"params": model.rest(), "structure": "elementwise"}]
    return entry.make(groups, period, 1024)


def by_recipe(entry: Entry, model: GPT, period: int) -> Optimizer:
    """Return the recipe for the whole model, as `IFShampoo.for_model` splits it."""
    options = {"precondition_frequency": period, "max_preconditioner_dim": 1024, **entry.make.keywords}
    return IFShampoo.for_model(model, **options)


def beside_adamw(entry: Entry, model: GPT, period: int) -> Optimizer:
    """Return theirs for the matrices, with AdamW for the rest."""
    return Together(entry.make(model.matrices(), period, 1024), ADAMW(model.rest(), period, 1024))


ALWAYS, SELDOM = 1, 10

ROWS: dict[str, tuple[str, int, Callable[[Entry, GPT, int], Optimizer]]] = {
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
"""By the name of a row: the entry, T, and the function that makes the optimizer."""

BASELINE = "AdamW, fused"
"""The row that the others are compared with."""


# ---- measuring ---------------------------------------------------------------------------------------------------


@dataclass
class Trainee:
    """A model with its optimizer."""

    task: Task
    device: torch.device
    make: Callable[[GPT], Optimizer]
    steps: list[float] = field(default_factory=list)
    in_optimizer: list[float] = field(default_factory=list)
    peak: int = 0

    def prepare(self) -> None:
        """Make model and optimizer."""
        torch.manual_seed(0)
        self.model = GPT(self.task.model).to(self.device)
        self.optimizer = self.make(self.model)

    def warm_up(self, tokens: Tensor, clock: Any, number: int) -> None:
        """Take a step and forget its time. Its memory is measured where it may be an update."""
        if number % SELDOM in (0, SELDOM - 1):
            params = [*self.model.parameters()]
            kept = sum(x.nbytes for x in params) + state_bytes(self.optimizer, params)
            self.peak = max(self.peak, kept + peak_bytes(partial(self.step, tokens, clock), self.device))
        else:
            self.step(tokens, clock)
        self.steps.clear()
        self.in_optimizer.clear()

    def step(self, tokens: Tensor, clock: Any) -> None:
        """Take a step and note its time, and that of the optimizer's part."""
        clock.synchronize()
        marks = [clock.mark()]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.task.bf16):
            loss = self.model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        marks.append(clock.mark())
        self.optimizer.step()
        marks.append(clock.mark())
        self.optimizer.zero_grad()
        clock.synchronize()
        self.steps.append(clock.elapsed(marks[0], marks[2]))
        self.in_optimizer.append(clock.elapsed(marks[1], marks[2]))

    def row(self) -> dict[str, Any]:
        """Return means over whole cycles of T, to which an update belongs as often as it comes."""
        steps, in_optimizer = sum(self.steps), sum(self.in_optimizer)
        return {
            "mean": steps / len(self.steps),
            "spread": Timing.of(self.steps)._asdict(),
            "optimizer_share": in_optimizer / steps,
            "in_optimizer": in_optimizer / len(self.steps),
            "tokens_per_second": self.task.tokens * len(self.steps) / steps * 1e6,
            "state_bytes": state_bytes(self.optimizer, self.model.parameters()),
            "peak_bytes": self.peak,
        }


def names_of(device: torch.device, entries: Sequence[Entry]) -> list[str]:
    """Return the rows that these entries take part in."""
    chosen = ((name, ENTRIES[entry]) for name, (entry, _, _) in ROWS.items() if entry in ENTRIES)
    return [name for name, entry in chosen if entry in entries and device.type in entry.devices]


def contestants(task: Task, device: torch.device, names: Sequence[str]) -> dict[str, Trainee]:
    """Return the trainees of these rows."""
    rows = {name: ROWS[name] for name in names}
    return {
        name: Trainee(task, device, partial(make, ENTRIES[entry], period=period))
        for name, (entry, period, make) in rows.items()
    }


def batches(task: Task, device: torch.device) -> Iterator[Tensor]:
    """Yield random tokens, without end: of each sequence one more than the model reads, which is the last target."""
    generator = torch.Generator(device=device).manual_seed(0)
    size = (task.batch, task.model.context + 1)
    while True:
        yield torch.randint(task.model.vocabulary, size, generator=generator, device=device)


def measure(
    task: Task, clock: Any, device: torch.device, names: Sequence[str], cycles: tuple[int, int], deadline: float
) -> list[dict[str, Any]]:
    """Return a row for each name, with times in µs. `cycles` are the numbers of cycles of T = 10 that warm up and that
    are measured. On a GPU each optimizer trains alone, since its memory is measured; on a CPU they take turns."""
    rows = []
    trainees = contestants(task, device, names)
    alone = device.type == "cuda"
    for group in [{name: x} for name, x in trainees.items()] if alone else [trainees]:
        problems = _train(group, task, clock, device, cycles, deadline)
        for name, trainee in group.items():
            row = {"optimizer": name, "task": task.name}
            rows.append(row | ({"error": problems[name]} if name in problems else trainee.row()))
            vars(trainee).pop("model", None), vars(trainee).pop("optimizer", None)
        release()
    return rows


def _train(
    group: dict[str, Trainee], task: Task, clock: Any, device: torch.device, cycles: tuple[int, int], deadline: float
) -> dict[str, str]:
    """Train for all cycles, and return why a trainee stopped before, by name."""
    problems: dict[str, str] = {}
    data = batches(task, device)
    for number in range(sum(cycles) * SELDOM):
        tokens = next(data)
        running = [name for name in group if name not in problems]
        for name in running[:: 1 if number % 2 else -1]:
            try:
                if time.perf_counter() > deadline:
                    raise TimeoutError("left out: the run's time was over")
                if number == 0:
                    group[name].prepare()
                if number < cycles[0] * SELDOM:
                    group[name].warm_up(tokens, clock, number)
                else:
                    group[name].step(tokens, clock)
            except Exception as error:  # of any kind: it is recorded, and the others go on
                problems[name] = f"{type(error).__name__}: {error}"
    return problems
