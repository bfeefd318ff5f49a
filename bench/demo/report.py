"""What a run of `bench.demo` leaves behind: a table, a summary and a plot."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Run:
    """What one optimizer did. Losses are in nats per byte, times in seconds without evaluations."""

    train: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    held_out_seconds: dict[int, float] = field(default_factory=dict)
    """Seconds of training until each evaluation."""

    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    state_bytes: int = 0

    @property
    def final_train_loss(self) -> float:
        """The mean over the last tenth of the steps."""
        last = self.train[-max(1, len(self.train) // 10) :]
        return sum(last) / len(last)

    @property
    def held_out_loss(self) -> float:
        return self.held_out[len(self.train)]

    @property
    def steps_per_second(self) -> float:
        return len(self.train) / self.seconds

    @property
    def optimizer_share(self) -> float:
        """The part of ``seconds`` spent in ``optimizer.step``."""
        return self.optimizer_seconds / self.seconds

    def seconds_to(self, loss: float) -> float | None:
        """Seconds of training until the held-out loss was `loss`, between evaluations along a line; None if never."""
        before: tuple[float, float] | None = None
        for step, now in self.held_out.items():
            seconds = self.held_out_seconds[step]
            if now <= loss:
                if before is None or before[1] == now:
                    return seconds
                part = (before[1] - loss) / (before[1] - now)
                return before[0] + part * (seconds - before[0])
            before = seconds, now
        return None

    def summary(self) -> dict[str, float]:
        """The numbers of the table."""
        names = ("final_train_loss", "held_out_loss", "steps_per_second", "optimizer_share", "state_bytes")
        return {name: getattr(self, name) for name in names}


def seconds_to_baseline(runs: dict[str, Run]) -> dict[str, float | None]:
    """Seconds of training that each method took to the last held-out loss of the first."""
    loss = next(iter(runs.values())).held_out_loss
    return {method: run.seconds_to(loss) for method, run in runs.items()}


def table_of(runs: dict[str, Run]) -> Table:
    """The runs' summaries, one line a method."""
    from rich.table import Table

    table = Table("optimizer", caption="losses in nats per byte; train: mean of the last tenth of the steps")
    first, seconds = next(iter(runs)), seconds_to_baseline(runs)
    for name in ("train loss", "held-out", "steps/s", "in optimizer", "state", f"s to {first}'s loss"):
        table.add_column(name, justify="right")
    for method, run in runs.items():
        losses = (f"{loss:.3f}" for loss in (run.final_train_loss, run.held_out_loss))
        times = (f"{run.steps_per_second:.2f}", f"{run.optimizer_share:.1%}")
        until = seconds[method]
        reached = "never" if until is None else f"{until:.1f}"
        table.add_row(method, *losses, *times, f"{run.state_bytes / 1e6:.1f} MB", reached)
    return table


def plot(runs: dict[str, Run], path: Path) -> None:
    """Train loss, smoothed over about ten steps, as lines; held-out loss as markers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, run in runs.items():
        smooth = [run.train[0]]
        for loss in run.train[1:]:
            smooth.append(0.9 * smooth[-1] + 0.1 * loss)
        (line,) = axes.plot(range(1, len(smooth) + 1), smooth, label=method, linewidth=1.2)
        axes.plot(list(run.held_out), list(run.held_out.values()), "o", color=line.get_color(), markersize=5)
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="Lines: train (smoothed). Markers: held-out.")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def write_summary(path: Path, runs: dict[str, Run], about: dict[str, Any]) -> None:
    """The table's numbers, the course of the held-out loss, and what is needed to repeat them."""
    seconds = seconds_to_baseline(runs)
    results = {
        method: {
            **run.summary(),
            "seconds_to_baseline": seconds[method],
            "held_out": [(step, run.held_out_seconds[step], loss) for step, loss in run.held_out.items()],
        }
        for method, run in runs.items()
    }
    path.write_text(json.dumps({**about, "results": results}, indent=2, default=str) + "\n")
