"""Train a byte-level GPT on a GPU with several optimizers, each for the same time or the same number of steps.

    python -m bench.demo --device cuda --size 30m|124m --seconds 60
    python -m bench.demo --device cuda --size 30m --steps 1000 --optimizers adamw muon --set adamw.lr=2e-3

The text is that of the Python sources in this machine's site-packages, a tenth of the files held out. Every optimizer
starts from the same weights and sees the same batches in the same order; on a GPU, products are in BF16 (autocast).
Losses are in nats per byte.

Time and schedule. Each method first takes throw-away steps, an evaluation among them: kernels are compiled, memory is
allocated, and the time of a step is measured; weights are then put back and the optimizer is made anew. With --seconds
the method's number of steps is that time divided by the measured time of a step, so that every method has the same
schedule (a short warm-up, then a cosine to zero) over its own number of steps, ends it when the time is over, and is
judged at its end. Only the time of training counts: the clock stops for evaluations. All methods are evaluated at
multiples of the same number of steps, and the report also compares them at the last one that all have reached; the
slower a method, the further its learning rate has come down there, which favours it, so that the report shows the
factor. --steps instead gives every method the same number of steps and thereby the same schedule exactly.

Writes to --out as it goes: `progress.jsonl`, one line an evaluation; after every method `summary.json`, `README.md`
and, where there is matplotlib, two plots. A method that diverges or fails (out of memory, say) is recorded, and the
others go on; the exit status is 1 where one failed.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, TextIO

import torch
from torch import Tensor

from bench.common.memory import release, state_bytes
from bench.common.record import gpu, provenance
from bench.common.timing import clock_of
from bench.demo.data import Corpus, read_corpus
from bench.demo.language_options import is_asked_for, parse
from bench.demo.language_report import Course, write_report
from bench.demo.language_settings import HEAD_WIDTH, make, settings_of
from bench.demo.model import GPT, Task, batches, warmup_cosine

__all__ = ["is_asked_for", "main"]

EVALUATIONS = 12
"""Evaluations of a method, about; held-out loss is the mean over as many batches as below."""

HELD_OUT_BATCHES = 8
OVERTIME = 1.25
"""Of the time that was asked for: a method that takes longer, since its steps were measured too fast, is stopped."""


@dataclass
class Session:
    """What all methods of a run have in common. `every`, the steps between evaluations, is set by the first of them."""

    task: Task
    device: torch.device
    corpus: Corpus
    seconds: float
    steps: int | None
    """Steps of every method; None: as many as there is time for."""

    log: Callable[[dict[str, Any]], None]
    compile: bool = False
    every: int = 0

    def __post_init__(self) -> None:
        self.clock = clock_of(self.device)
        self.held_out = [*batches(self.corpus.held_out, HELD_OUT_BATCHES, self.task, seed=0)]

    def train_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches that every method sees."""
        return batches(self.corpus.train, count, self.task, seed=self.task.seed + 1)

    def plan(self, step_seconds: float) -> Task:
        """Return the task with the number of steps of a method whose steps take this long."""
        steps = self.steps or max(1, round(self.seconds / step_seconds))
        self.every = self.every or round_number(steps / EVALUATIONS)
        return replace(self.task, steps=steps)


def round_number(value: float) -> int:
    """Return the largest of 1, 2, 3, 5, 10, 20, … that is not above `value`; at least 1."""
    power = 10 ** max(0, math.floor(math.log10(max(value, 1.0))))
    return max(factor * power for factor in (1, 2, 3, 5) if factor * power <= max(value, 1.0))


class Diverged(Exception):
    """A loss is not finite."""


@dataclass
class Trainee:
    """A model with its optimizer."""

    method: str
    settings: Mapping[str, Any]
    session: Session
    course: Course = field(default_factory=Course)

    def __post_init__(self) -> None:
        torch.manual_seed(self.session.task.seed)
        self.model = GPT(self.session.task, HEAD_WIDTH).to(self.session.device)
        self.loss = torch.compile(self.model.loss) if self.session.compile else self.model.loss
        self.optimizer = make(self.method, self.model, self.settings)

    @cached_property
    def cycle(self) -> int:
        """Steps that are measured together: at least five, and whole cycles of T, since updates take longer."""
        period = self.settings.get("precondition_frequency", 1)
        return 5 if not isinstance(period, int) else period * math.ceil(5 / period)

    def loss_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        device = self.session.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return self.loss(inputs, targets)

    def step(self, batch: tuple[Tensor, Tensor], marks: list[Any] | None = None) -> Tensor:
        """Take a step and return the loss before it, on the device. `marks` gets times before and after the
        optimizer's part."""
        loss = self.loss_of(*batch)
        self.optimizer.zero_grad()
        loss.backward()
        if marks is not None:
            marks.append(self.session.clock.mark())
        self.optimizer.step()
        if marks is not None:
            marks.append(self.session.clock.mark())
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the held-out loss; the device is read once."""
        losses = [self.loss_of(*batch) for batch in self.session.held_out]
        return float(torch.stack(losses).mean())

    # ---- before the run ----------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Take throw-away steps, the later ones measured; then put the weights back and make the optimizer anew."""
        start = [x.detach().clone() for x in self.model.parameters()]
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.01  # so that no settings diverge already here
        self._burst(2)
        self.evaluate()
        self._measure()
        with torch.no_grad():
            for param, value in zip(self.model.parameters(), start, strict=True):
                param.copy_(value)
                param.grad = None
        self.optimizer = make(self.method, self.model, self.settings)
        release()

    def _burst(self, cycles: int) -> tuple[float, float]:
        """Take the steps of some cycles; return the seconds of a step, and the optimizer's share of them."""
        clock, marks, count = self.session.clock, [], cycles * self.cycle
        clock.synchronize()
        begin = time.perf_counter()
        for batch in self.session.train_batches(count):
            self.step(batch, marks)
        clock.synchronize()
        seconds = time.perf_counter() - begin
        in_optimizer = sum(clock.elapsed(*pair) for pair in zip(marks[::2], marks[1::2], strict=True))
        return seconds / count, in_optimizer * 1e-6 / seconds

    def _measure(self) -> None:
        """Measure the time of a step, for a twentieth of the run's time and two seconds at most."""
        enough = 0.0 if self.session.steps else min(2.0, 0.05 * self.session.seconds)
        about, _ = self._burst(1)
        self.course.step_seconds, self.course.share = self._burst(math.ceil(enough / (about * self.cycle)) or 1)

    # ---- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train over the whole schedule, or until the loss is not finite or the time is over by far.

        Raises:
            Diverged: with the step at which the loss was not finite.
        """
        task = self.session.plan(self.course.step_seconds)
        self.course.planned = task.steps
        if self.session.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.session.device)  # what the warm-up took does not count
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: warmup_cosine(step, task))
        data = self.session.train_batches(task.steps)
        losses = torch.empty(self.session.every, device=self.session.device)
        for first in range(0, task.steps, self.session.every):
            count = min(self.session.every, task.steps - first)
            self._train(count, data, schedule, losses)
            self.course.state_bytes = state_bytes(self.optimizer, self.model.parameters())
            self._evaluate(warmup_cosine(first + count - 1, task))
            if not self.session.steps and self.course.seconds > OVERTIME * self.session.seconds:
                break

    def _train(self, count: int, data: Iterator[tuple[Tensor, Tensor]], schedule: Any, losses: Tensor) -> None:
        """Take `count` steps; their losses stay on the device until all are taken."""
        self.session.clock.synchronize()
        begin = time.perf_counter()
        for index in range(count):
            losses[index] = self.step(next(data))
            schedule.step()
        self.session.clock.synchronize()
        self.course.seconds += time.perf_counter() - begin
        for loss in losses[:count].tolist():
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at step {len(self.course.train) + 1}")
            self.course.train.append(loss)

    def _evaluate(self, factor: float) -> None:
        """Evaluate after an interval, and write a line."""
        course, step = self.course, len(self.course.train)
        held_out = self.evaluate()
        if not math.isfinite(held_out):
            raise Diverged(f"the held-out loss is {held_out} after step {step}")
        course.held_out[step], course.held_out_seconds[step] = held_out, course.seconds
        course.lr_factors[step] = factor
        recent = course.recent_train_loss()
        figures = {"step": step, "steps": course.planned, "seconds": course.seconds, "lr_factor": factor}
        self.session.log({"optimizer": self.method, **figures, "train_loss": recent, "held_out_loss": held_out})


def train(method: str, settings: Mapping[str, Any], session: Session) -> Course:
    """Train one method from the start; what stops it is recorded in the course and in the log."""
    trainee, course = None, Course()
    try:
        trainee = Trainee(method, settings, session, course)
        trainee.warm_up()
        trainee.run()
    except Diverged as problem:
        course.diverged = str(problem)
        session.log({"optimizer": method, "seconds": course.seconds, "diverged": course.diverged})
    except Exception as problem:  # of any kind, out of memory too: it is recorded, and the other methods go on
        course.error = f"{type(problem).__name__}: {problem}"
        session.log({"optimizer": method, "seconds": course.seconds, "error": course.error})
    if session.device.type == "cuda":
        course.peak_bytes = torch.cuda.max_memory_allocated(session.device)
    del trainee
    release()
    return course


# ---- command line ------------------------------------------------------------------------------------------------


def logger(file: TextIO, start: float) -> Callable[[dict[str, Any]], None]:
    """Return a function that writes a line of JSON at once, and prints it."""

    def log(row: dict[str, Any]) -> None:
        file.write(json.dumps(row) + "\n")
        file.flush()
        figures = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        print(f"{time.perf_counter() - start:7.1f} s  " + ", ".join(figures), flush=True)

    return log


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all methods and write what they did; the exit status is 1 where one failed other than by diverging."""
    start, given = time.perf_counter(), sys.argv[1:] if arguments is None else [*arguments]
    options, task = parse(given, __doc__ or "")
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    corpus = read_corpus(options.max_bytes).to(device)
    sizes = {"train": len(corpus.train), "held_out": len(corpus.held_out), "files": corpus.num_files}
    settings = {x: settings_of(x, options.size, task, options.changes.get(x, {})) for x in options.optimizers}
    weights = sum(x.numel() for x in GPT(task, HEAD_WIDTH).parameters())
    about = {
        **provenance(shlex.join(["python", "-m", "bench.demo", *given])),
        **gpu(device),
        "size": options.size,
        "weights": weights,
        "task": {**asdict(task), "steps": options.steps, "seconds": None if options.steps else options.seconds},
        "compiled": options.compile,
        "data": {"source": corpus.source, **sizes},
        "settings": settings,
    }
    print(f"{weights:,} weights; {corpus.source}: {sizes['train']:,} bytes to train on, {sizes['held_out']:,} held out")
    options.out.mkdir(parents=True, exist_ok=True)
    courses: dict[str, Course] = {}
    write_report(options.out, about, courses)  # so that a run which is cut short says where it comes from
    with (options.out / "progress.jsonl").open("w", encoding="utf-8") as file:
        session = Session(task, device, corpus, options.seconds, options.steps, logger(file, start), options.compile)
        for method in options.optimizers:
            courses[method] = train(method, settings[method], session)
            about["wall_seconds"] = time.perf_counter() - start
            print(write_report(options.out, about, courses))
    return int(any(course.error for course in courses.values()))


if __name__ == "__main__":
    sys.exit(main())
