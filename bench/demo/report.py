"""What a run of the demo leaves behind: a summary, a page with a table, and two plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.record import write_json
from bench.common.report import table as markdown_table


class Evaluation(NamedTuple):
    """A point of a run."""

    step: int
    seconds: float
    """Seconds of training until then."""

    held_out_loss: float
    train_loss: float
    """The mean over the steps since the last evaluation."""

    lr_factor: float
    """What the learning rate was multiplied by in the step before."""


@dataclass
class Run:
    """What one method did, as far as it came. Losses are in nats per byte, times in seconds without evaluations."""

    train: list[float] = field(default_factory=list)
    """The loss of every step."""

    evaluations: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    """The part of `seconds` that was spent in `optimizer.step`."""

    state_bytes: int = 0
    planned: int = 0
    """Steps of the schedule."""

    step_seconds: float = 0.0
    """Seconds of a step, as measured before the run."""

    peak_bytes: int = 0
    sample: str = ""
    """Text that the model wrote at the end."""

    diverged: str = ""
    error: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether the schedule was trained to its end."""
        return 0 < self.planned == len(self.train) and not (self.diverged or self.error)

    @property
    def final_train_loss(self) -> float | None:
        """The mean over the last tenth of the steps."""
        last = self.train[-max(1, len(self.train) // 10) :]
        return sum(last) / len(last) if last else None

    @property
    def held_out_loss(self) -> float | None:
        return self.evaluations[-1].held_out_loss if self.evaluations else None

    def at_step(self, step: int | None) -> Evaluation | None:
        return next((x for x in self.evaluations if x.step == step), None)

    def seconds_to(self, loss: float | None) -> float | None:
        """Return the seconds of training until the held-out loss was `loss`, between evaluations along a line; None if
        it never was."""
        if loss is None:
            return None
        before = None
        for now in self.evaluations:
            if now.held_out_loss <= loss:
                if before is None:
                    return now.seconds
                part = (before.held_out_loss - loss) / (before.held_out_loss - now.held_out_loss)
                return before.seconds + part * (now.seconds - before.seconds)
            before = now
        return None

    def figures(self) -> dict[str, Any]:
        """Return losses, speed and memory."""
        return {
            "final_train_loss": self.final_train_loss,
            "held_out_loss": self.held_out_loss,
            "steps_per_second": len(self.train) / self.seconds if self.seconds else None,
            "optimizer_share": self.optimizer_seconds / self.seconds if self.seconds else None,
            "state_bytes": self.state_bytes,
        }

    def as_json(self, baseline: float | None) -> dict[str, Any]:
        """Return everything that is recorded. `baseline` is the loss that `seconds_to_baseline` is about."""
        return {
            **self.figures(),
            "seconds_to_baseline": self.seconds_to(baseline),
            "steps": len(self.train),
            "planned_steps": self.planned,
            "complete": self.is_complete,
            "seconds": self.seconds,
            "step_seconds_measured_before": self.step_seconds or None,
            "peak_bytes": self.peak_bytes,
            "diverged": self.diverged or None,
            "error": self.error or None,
            "held_out": [(x.step, x.seconds, x.held_out_loss) for x in self.evaluations],
        }


Runs = Mapping[str, Run]


def baseline_of(runs: Runs) -> tuple[str, float | None]:
    """Return the name and the last held-out loss of the first run that is complete."""
    complete = ((name, run.held_out_loss) for name, run in runs.items() if run.is_complete)
    return next(complete, ("the first", None))


def common_step(runs: Runs) -> int | None:
    """Return the last step at which all runs were evaluated that neither diverged nor failed; None without one."""
    steps = [{x.step for x in run.evaluations} for run in runs.values() if not (run.diverged or run.error)]
    return max(set.intersection(*steps), default=None) if steps else None


# ---- the table ---------------------------------------------------------------------------------------------------


def table(runs: Runs) -> str:
    """Return a Markdown table with a row for each method. Columns that would be empty are left out."""
    rows = [{"optimizer": name, **_cells(run, runs)} for name, run in runs.items()]
    columns = dict.fromkeys(name for row in rows for name, cell in row.items() if cell)
    return "\n".join(markdown_table([*columns], [[row.get(name, "") for name in columns] for row in rows]))


def _cells(run: Run, runs: Runs) -> dict[str, str]:
    if not run.evaluations:
        return {"steps": _ending(run)}
    (first, loss), step, taken = baseline_of(runs), common_step(runs), len(run.train)
    common = run.at_step(step) if len({x.planned for x in runs.values() if x.evaluations}) > 1 else None
    until = run.seconds_to(loss)
    return {
        "steps": f"{taken}" if run.is_complete else f"{taken} of {run.planned}: {_ending(run)}",
        "seconds": f"{run.seconds:.1f}",
        "ms a step": f"{1e3 * run.seconds / taken:.1f}",
        "optimizer's share": f"{run.optimizer_seconds / run.seconds:.1%}",
        "train loss": f"{run.final_train_loss:.4f}",
        "held-out loss": f"{run.held_out_loss:.4f}",
        f"at step {step} (lr ×)": f"{common.held_out_loss:.4f} ({common.lr_factor:.2f})" if common else "",
        f"seconds to {first}'s loss": "never" if until is None else f"{until:.1f}",
        "state": f"{run.state_bytes / 1e6:.1f} MB",
        "peak memory": f"{run.peak_bytes / 1e9:.2f} GB" if run.peak_bytes else "",
    }


def _ending(run: Run) -> str:
    """Return why a run is not complete."""
    why = f"diverged, {run.diverged}" if run.diverged else run.error or "out of time"
    return why.splitlines()[0][:160]


# ---- the files ---------------------------------------------------------------------------------------------------


def markdown(about: Mapping[str, Any], runs: Runs, plots: list[str]) -> str:
    """Return the page: where the figures come from, the table, the plots."""
    task, sizes = about["task"], about["bytes"]
    budget = f"{task['steps']} steps" if task["steps"] else f"{task['seconds']:g} s of training"
    lines = [
        f"# A byte-level GPT of {about['weights'] / 1e6:.2f}M weights, {budget} a method",
        "",
        f"{about['device']}, torch {about['torch']}, commit {about['commit']}, {about['date']}: `{about['command']}`",
        "",
        f"{about['data']['source']}: {sizes['train'] / 1e6:.1f} MB to train on, {sizes['held_out'] / 1e6:.1f} MB held "
        "out. "
        f"Batches of {task['batch']} × {task['length']} bytes, seed {task['seed']}. Losses in nats per byte; train "
        "loss: mean of the last tenth of the steps. In brackets the learning rate's factor at that step: the smaller, "
        "the nearer the end of the schedule, which favours a method. Settings were "
        f"{'tuned' if about['size'] == 'small' else 'not tuned'} at this size.",
        "",
        table(runs),
        "",
        *(f"![{name}]({name})" for name in plots),
    ]
    return "\n".join(lines).rstrip() + "\n"


def write_report(folder: Path, about: Mapping[str, Any], runs: Runs) -> None:
    """Write summary, page and, where there is matplotlib, plots of the methods that are done."""
    _, loss = baseline_of(runs)
    step = common_step(runs)
    same = {name: point.held_out_loss for name, run in runs.items() if (point := run.at_step(step))}
    results = {name: run.as_json(loss) for name, run in runs.items()}
    summary = {**about, "results": results, "same_steps": {"step": step, "held_out_loss": same}}
    write_json(folder / "summary.json", summary, default=str)  # settings hold dtypes
    plots = []
    if find_spec("matplotlib") and any(run.evaluations for run in runs.values()):
        from bench.demo.plot import draw

        for axis in ("seconds", "steps"):
            plots.append(f"loss-by-{axis}.png")
            draw(summary, folder / plots[-1], axis)
    (folder / "README.md").write_text(markdown(about, runs, plots), encoding="utf-8")
