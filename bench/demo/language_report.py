"""What a run of `bench.demo.language` leaves behind: a summary, a table and two plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.demo.report import Run

Courses = Mapping[str, "Course"]


@dataclass
class Course(Run):
    """What one optimizer did, as far as it came."""

    planned: int = 0
    """Steps of its schedule."""

    step_seconds: float = 0.0
    """Of a step, as measured before the run; `share` of it is the optimizer's."""

    share: float = 0.0
    lr_factors: dict[int, float] = field(default_factory=dict)
    """What the learning rate was multiplied by in the step before each evaluation."""

    peak_bytes: int = 0
    diverged: str = ""
    error: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether the schedule was trained to its end."""
        return 0 < self.planned == len(self.train) and not (self.diverged or self.error)

    def recent_train_loss(self) -> float:
        """Return the mean train loss since the evaluation before the last step's."""
        steps = [step for step in self.held_out if step < len(self.train)]
        recent = self.train[max(steps, default=0) :]
        return sum(recent) / len(recent)

    def as_json(self) -> dict[str, Any]:
        last = max(self.held_out, default=None)
        return {
            "steps": len(self.train),
            "planned_steps": self.planned,
            "complete": self.is_complete,
            "seconds": self.seconds,
            "step_seconds_measured_before": self.step_seconds,
            "optimizer_share_measured_before": self.share,
            "final_train_loss": self.final_train_loss if self.train else None,
            "held_out_loss": None if last is None else self.held_out[last],
            "state_bytes": self.state_bytes,
            "peak_bytes": self.peak_bytes,
            "diverged": self.diverged or None,
            "error": self.error or None,
            "evaluations": [
                {
                    "step": step,
                    "seconds": self.held_out_seconds[step],
                    "held_out_loss": loss,
                    "lr_factor": self.lr_factors[step],
                }
                for step, loss in self.held_out.items()
            ],
        }


def common_step(courses: Courses) -> int | None:
    """Return the last step at which all methods were evaluated, but for those that diverged or failed; None without
    one."""
    steps = [{*course.held_out} for course in courses.values() if not (course.diverged or course.error)]
    return max(set.intersection(*steps), default=None) if steps else None


def seconds_to(courses: Courses) -> dict[str, float | None]:
    """Return each method's seconds of training until the last held-out loss of the first that finished."""
    finished = [course for course in courses.values() if course.is_complete]
    return {
        name: course.seconds_to(finished[0].held_out_loss) if finished else None for name, course in courses.items()
    }


# ---- the table ---------------------------------------------------------------------------------------------------


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def table(courses: Courses) -> str:
    """Return a row a method in Markdown."""
    step, until = common_step(courses), seconds_to(courses)
    first = next((name for name, course in courses.items() if course.is_complete), "the first")
    names = ["optimizer", "steps", "seconds", "ms a step", "optimizer's share", "train loss", "held-out loss"]
    names += [f"at step {step} (lr ×)", f"seconds to {first}'s loss", "state", "peak memory"]
    lines = [_line(names), _line(["---"] * len(names))]
    for name, course in courses.items():
        lines.append(_line([name, *_cells(course, step, until[name])]))
    return "\n".join(lines)


def _cells(course: Course, step: int | None, until: float | None) -> list[str]:
    if not course.held_out:
        return [_ending(course), *[""] * 9]
    taken = len(course.train)
    last = course.held_out[max(course.held_out)]
    common = f"{course.held_out[step]:.4f} ({course.lr_factors[step]:.2f})" if step in course.held_out else ""
    return [
        f"{taken}" if course.is_complete else f"{taken} of {course.planned}: {_ending(course)}",
        f"{course.seconds:.1f}",
        f"{1e3 * course.seconds / taken:.1f}",
        f"{course.share:.1%}",
        f"{course.final_train_loss:.4f}",
        f"{last:.4f}",
        common,
        "never" if until is None else f"{until:.1f}",
        f"{course.state_bytes / 1e6:.0f} MB",
        f"{course.peak_bytes / 1e9:.2f} GB" if course.peak_bytes else "",
    ]


def _ending(course: Course) -> str:
    """Return why a course is not complete."""
    why = f"diverged, {course.diverged}" if course.diverged else course.error or "out of time"
    return why.splitlines()[0][:160].replace("|", "/")


def markdown(about: Mapping[str, Any], courses: Courses, plots: list[str]) -> str:
    """Return the page: where the figures come from, the table, the plots."""
    task, data = about["task"], about["data"]
    budget = f"{task['steps']} steps" if task["steps"] else f"{task['seconds']:g} s of training"
    lines = [
        f"# A byte-level GPT of {about['weights'] / 1e6:.1f}M weights, {budget} a method",
        "",
        f"{about['device']}, torch {about['torch']}, commit {about['commit']}, {about['date']}: `{about['command']}`",
        "",
        f"{data['source']}: {data['train'] / 1e6:.1f} MB to train on, {data['held_out'] / 1e6:.1f} MB held out. "
        f"Batches of {task['batch']} × {task['length']} bytes, seed {task['seed']}. Losses in nats per byte; train "
        "loss: mean of the last tenth of the steps. In brackets the learning rate's factor at that step: the smaller, "
        "the nearer the end of the schedule, which favours a method. Settings were not tuned at this size.",
        "",
        table(courses),
        "",
        *(f"![{name}]({name})" for name in plots),
    ]
    return "\n".join(lines).rstrip() + "\n"


# ---- plots and files ---------------------------------------------------------------------------------------------


def draw(courses: Courses, folder: Path) -> list[str]:
    """Draw held-out loss against seconds and against steps; return the files' names, none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    if not any(course.held_out for course in courses.values()):
        return []
    axis: dict[str, Callable[[Course], list[float]]] = {
        "seconds": lambda course: [*course.held_out_seconds.values()],
        "steps": lambda course: [*course.held_out],
    }
    for name, values in axis.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for method, course in courses.items():
            axes.plot(values(course), [*course.held_out.values()], marker="o", markersize=3, label=method)
        axes.set(xlabel=f"{name} of training" if name == "seconds" else name, ylabel="held-out loss, nats per byte")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.2f}")
        axes.yaxis.set_minor_formatter("{x:.2f}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        figure.savefig(folder / f"loss-by-{name}.png", dpi=120)
    return [f"loss-by-{name}.png" for name in axis]


def write_report(folder: Path, about: Mapping[str, Any], courses: Courses) -> str:
    """Write summary, page and plots of the methods that are done; return the table."""
    step, until = common_step(courses), seconds_to(courses)
    results = {name: {**course.as_json(), "seconds_to_first": until[name]} for name, course in courses.items()}
    same = {name: course.held_out[step] for name, course in courses.items() if step in course.held_out}
    summary = {**about, "results": results, "same_steps": {"step": step, "held_out_loss": same}}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, default=str) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(markdown(about, courses, draw(courses, folder)), encoding="utf-8")
    return table(courses)
