"""The plots of a run of `bench.compare`. Without matplotlib there are none, and `--page` draws them later."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.common.optimizers import ENTRIES
from bench.compare.contest import OTHER, UPDATE, mean_step
from bench.compare.page import block_name
from bench.compare.targets import Record, measured_rows

PERIODS = (1, 2, 5, 10, 20, 50, 100)


def draw_all(record: Record, folder: Path) -> dict[str, str]:
    """Write the plots that the record has figures for; their titles by file name."""
    if find_spec("matplotlib") is None:
        return {}
    drawn = {}
    for name, title, draw in PLOTS:
        if figure := draw(record):
            figure.savefig(folder / name, dpi=110)
            drawn[name] = title
    return drawn


def _figure(width: float = 8, height: float = 4.8) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _style(name: str) -> dict[str, Any]:
    """A colour of its own for every optimizer, the same in all plots; ours are solid and thick."""
    color = f"C{[*ENTRIES].index(name) % 10}"
    return {"color": color, **({"linewidth": 2.2} if ENTRIES[name].is_ours else {"linewidth": 1.1, "linestyle": "--"})}


def _label(row: dict[str, Any]) -> str:
    return row["optimizer"] if row["uncut"] else f"{row['optimizer']}, {block_name(row['block'])}"


def _finish(axes: Any, **labels: str) -> None:
    axes.set(**labels)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")


def time_by_size(record: Record) -> Any:
    """Update and other step against the width of one weight."""
    rows = [row for row in record["scaling"].get("width", []) if UPDATE in row]
    if not rows:
        return None
    figure = _figure(11)
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), (UPDATE, OTHER), strict=True):
        for name in dict.fromkeys(row["optimizer"] for row in rows):
            points = [
                (row["size"], row[kind]["median"] / 1e3) for row in rows if row["optimizer"] == name and kind in row
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **_style(name))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title=kind if kind == UPDATE else "other step", xlabel="n of an n × n weight")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("ms")
    figure.axes[1].legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def main_workload(record: Record) -> str | None:
    """The one that is drawn: the model where it was measured, or the largest weight."""
    present = [row["workload"] for row in record["steps"] if UPDATE in row]
    for name in ("GPT-2 124M", "1024×4096", "1024²", *present):
        if name in present:
            return name
    return None


def time_by_period(record: Record) -> Any:
    """The mean step against T."""
    name = main_workload(record)
    if name is None:
        return None
    figure = _figure()
    axes = figure.subplots()
    for row in sorted(measured_rows(record, name), key=lambda row: -mean_step(row, 1)):
        times = [mean_step(row, period) / 1e3 for period in PERIODS]
        axes.plot(PERIODS, times, label=_label(row), **_style(row["optimizer"]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    _finish(axes, xlabel="T, steps between updates", ylabel="ms a step on average", title=name)
    return figure


def _bars(
    record: Record, title: str, values: Callable[[dict[str, Any]], tuple[float | None, float | None]], names: Any
) -> Any:
    """Two bars an optimizer on the workload that is drawn."""
    workload = main_workload(record)
    rows = [] if workload is None else [row for row in measured_rows(record, workload) if any(values(row))]
    if not rows:
        return None
    figure = _figure(8, 1.2 + 0.34 * len(rows))
    axes = figure.subplots()
    for offset, (index, name) in zip((0.2, -0.2), enumerate(names), strict=True):
        lengths = [values(row)[index] or 0.0 for row in rows]
        axes.barh([y - offset for y in range(len(rows))], lengths, height=0.38, label=name)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=7)
    axes.set(title=f"{title}, {workload}")
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=7)
    return figure


def roofline(record: Record) -> Any:
    kinds = (UPDATE, OTHER)
    return _bars(
        record,
        "fraction of the roofline",
        lambda row: (row.get(f"roofline of {UPDATE}"), row.get(f"roofline of {OTHER}")),
        kinds,
    )


def memory(record: Record) -> Any:
    return _bars(
        record,
        "bytes a weight beside weights and gradients",
        lambda row: (row["state_bytes"], row["peak_bytes"]),
        ("kept between steps", "taken at most"),
    )


PLOTS: tuple[tuple[str, str, Callable[[Record], Any]], ...] = (
    ("time-by-size.png", "Time of a step against the width of a weight", time_by_size),
    ("time-by-period.png", "Mean step against T", time_by_period),
    ("roofline.png", "Fraction of the roofline", roofline),
    ("memory.png", "Memory", memory),
)
