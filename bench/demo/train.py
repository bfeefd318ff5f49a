"""The training loop of the demo: a fresh model for each method, the same weights and the same batches for all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.memory import release, state_bytes
from bench.common.timing import clock_of
from bench.demo.data import Corpus, batches
from bench.demo.methods import make
from bench.demo.report import Evaluation, Run
from bench.demo.settings import Task

OVERTIME = 1.25
"""A method is stopped at this multiple of the time that was asked for, in case its steps were measured too fast."""

Batch = tuple[Tensor, Tensor]
CPU = torch.device("cpu")


@dataclass
class Session:
    """What all methods of a run have in common."""

    task: Task
    corpus: Corpus
    device: torch.device = CPU
    seconds: float | None = None
    """Training time of every method. If None, every method takes the task's number of steps."""

    evaluations: int = 10
    """Evaluations of the first method, about. All are evaluated at multiples of the same number of steps."""

    clip: float | None = None
    """The norm to which gradients are clipped."""

    compile: bool = False
    log: Callable[[dict[str, Any]], object] = lambda row: None
    """Gets a row at every evaluation."""

    every: int = field(default=0, init=False)
    """Steps between evaluations, set by the first method."""

    def __post_init__(self) -> None:
        self.clock = clock_of(self.device)
        self.held_out = [*batches(self.corpus.held_out, self.task.held_out_batches, self.task, seed=0)]

    @property
    def warms_up(self) -> bool:
        """Whether methods take throw-away steps: to be measured, or for a GPU to compile kernels."""
        return self.seconds is not None or self.device.type == "cuda"

    def train_batches(self, count: int) -> Iterator[Batch]:
        """Yield the batches that every method sees."""
        return batches(self.corpus.train, count, self.task, seed=self.task.seed + 1)

    def plan(self, step_seconds: float) -> Task:
        """Return the task with the number of steps of a method whose steps take this long."""
        if self.seconds is None:
            self.every = math.ceil(self.task.steps / self.evaluations)
            return self.task
        steps = max(1, round(self.seconds / step_seconds))
        self.every = self.every or round_number(steps / self.evaluations)
        return replace(self.task, steps=steps)


def round_number(value: float) -> int:
    """Return the largest of 1, 2, 3, 5, 10, 20, … that is not above `value`; at least 1."""
    power = 10 ** max(0, math.floor(math.log10(max(value, 1.0))))
    return max(factor * power for factor in (1, 2, 3, 5) if factor * power <= max(value, 1.0))


def warmup_cosine(step: int, task: Task) -> float:
    """Return the learning rate's factor: up in a line over the warm-up, then down to 0 along a cosine."""
    warmup = min(task.warmup, task.steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, task.steps - warmup)))


class Diverged(Exception):
    """A loss is not finite."""


@dataclass
class Trainee:
    """A model with its optimizer. On a CPU, `on_step` gets the number and the loss of every step."""

    method: str
    settings: Mapping[str, Any]
    session: Session
    run: Run = field(default_factory=Run)
    on_step: Callable[[int, float], object] = lambda step, loss: None

    def __post_init__(self) -> None:
        torch.manual_seed(self.session.task.seed)
        self.model = self.session.task.model().to(self.session.device)
        self.loss = torch.compile(self.model.loss) if self.session.compile else self.model.loss
        self.optimizer = make(self.method, self.model, self.settings, self.session.task)

    def loss_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        device = self.session.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return self.loss(inputs, targets)

    def step(self, batch: Batch, marks: list[Any]) -> Tensor:
        """Take a step and return the loss before it, on the device. `marks` gets the times before and after the
        optimizer's part."""
        loss = self.loss_of(*batch)
        self.optimizer.zero_grad()
        loss.backward()
        if self.session.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.session.clip)
        marks.append(self.session.clock.mark())
        self.optimizer.step()
        marks.append(self.session.clock.mark())
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss over the held-out batches; the device is read once."""
        losses = torch.stack([self.loss_of(*batch) for batch in self.session.held_out]).tolist()
        return sum(losses) / len(losses)

    # ---- before the run ----------------------------------------------------------------------------------------------

    @cached_property
    def cycle(self) -> int:
        """Steps that are measured together: at least five, and whole cycles of T, since updates take longer."""
        period = self.settings.get("precondition_frequency", self.settings.get("T", 1))
        return period * math.ceil(5 / period) if isinstance(period, int) else 5

    def warm_up(self) -> None:
        """Take throw-away steps and measure the later ones; then put the weights back and make the optimizer anew."""
        start = [x.detach().clone() for x in self.model.parameters()]
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.01  # so that no settings diverge already here
        self._burst(2)
        self.held_out_loss()
        about = self._burst(1)
        enough = min(2.0, 0.05 * (self.session.seconds or 0.0))
        self.run.step_seconds = self._burst(max(1, math.ceil(enough / (about * self.cycle))))
        with torch.no_grad():
            for param, value in zip(self.model.parameters(), start, strict=True):
                param.copy_(value)
                param.grad = None
        self.optimizer = make(self.method, self.model, self.settings, self.session.task)
        release()

    def _burst(self, cycles: int) -> float:
        """Take the steps of some cycles, and return the seconds of a step."""
        count = cycles * self.cycle
        self.session.clock.synchronize()
        begin = time.perf_counter()
        for batch in self.session.train_batches(count):
            self.step(batch, [])
        self.session.clock.synchronize()
        return (time.perf_counter() - begin) / count

    # ---- the run -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train over the whole schedule, or until the loss is not finite or the time is over by far.

        Raises:
            Diverged: with the step at which the loss was not finite.
        """
        session, run = self.session, self.run
        task = session.plan(run.step_seconds)
        run.planned = task.steps
        if session.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(session.device)  # what the warm-up took does not count
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: warmup_cosine(step, task))
        data = session.train_batches(task.steps)
        for first in range(0, task.steps, session.every):
            self._train(min(session.every, task.steps - first), data, schedule)
            run.state_bytes = state_bytes(self.optimizer, self.model.parameters())
            self._evaluate(warmup_cosine(len(run.train) - 1, task))
            if session.seconds is not None and run.seconds > OVERTIME * session.seconds:
                break

    def _train(self, count: int, data: Iterator[Batch], schedule: Any) -> None:
        """Take `count` steps. On a GPU their losses are read after the last one, so that no step waits."""
        clock, run = self.session.clock, self.run
        losses: list[Tensor] = []
        marks: list[Any] = []
        clock.synchronize()
        begin = time.perf_counter()
        for number in range(len(run.train) + 1, len(run.train) + count + 1):
            losses.append(self.step(next(data), marks))
            schedule.step()
            if self.session.device.type == "cpu":
                self.on_step(number, losses[-1].item())
                if not losses[-1].isfinite():
                    break
        clock.synchronize()
        run.seconds += time.perf_counter() - begin
        run.optimizer_seconds += 1e-6 * sum(clock.elapsed(*x) for x in zip(marks[::2], marks[1::2], strict=True))
        for loss in torch.stack(losses).tolist():
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at step {len(run.train) + 1}")
            run.train.append(loss)

    def _evaluate(self, factor: float) -> None:
        """Evaluate after an interval, and log a row."""
        run, step = self.run, len(self.run.train)
        recent = run.train[run.evaluations[-1].step if run.evaluations else 0 :]
        held_out = self.held_out_loss()
        if not math.isfinite(held_out):
            raise Diverged(f"the held-out loss is {held_out} after step {step}")
        run.evaluations.append(Evaluation(step, run.seconds, held_out, sum(recent) / len(recent), factor))
        self.session.log({"optimizer": self.method, "steps": run.planned, **run.evaluations[-1]._asdict()})


def train(trainee: Trainee) -> Run:
    """Train from the start to the end, with throw-away steps before. A run that diverges says so."""
    session, run = trainee.session, trainee.run
    try:
        if session.warms_up:
            trainee.warm_up()
        trainee.train()
    except Diverged as problem:
        run.diverged = str(problem)
        session.log({"optimizer": trainee.method, "seconds": run.seconds, "diverged": run.diverged})
    finally:
        if session.device.type == "cuda":
            run.peak_bytes = torch.cuda.max_memory_allocated(session.device)
    return run
