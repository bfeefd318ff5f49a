"""The plots of a run. They need matplotlib: without it there are none, and `--page` draws them later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.optimizers import ENTRIES, WHOLE
from bench.compare.contest import OTHER, UPDATE, mean_step
from bench.compare.targets import DEFAULT, FP32, LEAST, Record, Row, pick

METHODS = {
    "IFShampoo": (DEFAULT,),
    "IFShampoo, recipe": ("IFShampoo, recipe",),
    "RFRMSProp": ("RFRMSProp",),
    "AdamW": ("AdamW, fused",),
    "Muon": ("Muon of torch", "Muon of Dion, Triton"),
    "Distributed Shampoo (Meta)": tuple(name for name, entry in ENTRIES.items() if entry.family == "Shampoo"),
    "sirfshampoo": ("sirfshampoo",),
    "SOAP": ("SOAP", "SOAP of pytorch_optimizer"),
}
"""The entries of each method that is drawn. The best of them counts."""

PERIODS = (1, 2, 5, 10, 20, 50, 100)


def draw_all(record: Record, folder: Path) -> dict[str, str]:
    """Write the plots that the record has figures for, and return their titles by file name."""
    if find_spec("matplotlib") is None:
        return {}
    drawn = {}
    for name, title, draw in PLOTS:
        if figure := draw(record):
            figure.savefig(folder / name, dpi=150)
            drawn[name] = title
    return drawn


# ---- finding rows ------------------------------------------------------------------------------------------------


def measured_workload(record: Record, *wanted: str) -> str | None:
    """Return the first of these workloads that was measured, or else any, or None."""
    present = [row["workload"] for row in record["steps"] if UPDATE in row]
    return next((name for name in (*wanted, *present) if name in present), None)


def best(record: Record, workload: str, names: Iterable[str], figure: Callable[[Row], float]) -> Row | None:
    """Return the row with the least figure, in blocks of 1024 or, for Muon, with whole weights."""
    cases = [(name, block) for name in names for block in (1024, WHOLE) if block == 1024 or "Muon" in name]
    found = (pick(record, workload, *case) for case in cases)
    return min((row for row in found if row), key=figure, default=None)


# ---- bars --------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    label: str
    value: float
    text: str


def bars(title: str, xlabel: str, found: Iterable[Bar]) -> Any:
    """Draw horizontal bars with their values, the shortest first, ours in blue; nothing if there are none."""
    ordered = sorted(found, key=lambda bar: bar.value)
    if not ordered:
        return None
    figure, axes = _figure(7, 1.2 + 0.34 * len(ordered))
    ours = [bar.label.startswith(("IFShampoo", "RFRMSProp")) for bar in ordered]
    drawn = axes.barh(
        range(len(ordered)), [bar.value for bar in ordered], color=["C0" if own else "0.72" for own in ours]
    )
    axes.bar_label(drawn, [bar.text for bar in ordered], padding=4)
    axes.set_yticks(range(len(ordered)), [bar.label for bar in ordered])
    for tick, own in zip(axes.get_yticklabels(), ours, strict=True):
        tick.set_fontweight("bold" if own else "normal")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.supxlabel(xlabel, fontsize="medium")
    figure.suptitle(title)
    return figure


def _figure(width: float, height: float, columns: int = 1) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=True)


STEP_TIMES = {
    "AdamW": ("AdamW", 1),
    "Muon": ("Muon", 1),
    "IFShampoo.for_model": ("IFShampoo, recipe", 1),
    "IFShampoo, paper's rule": ("IFShampoo", 1),
    "IFShampoo, paper's rule, T = 10": ("IFShampoo", 10),
    "Distributed Shampoo (Meta), T = 10": ("Distributed Shampoo (Meta)", 10),
    "sirfshampoo, T = 10": ("sirfshampoo", 10),
    "SOAP, T = 10": ("SOAP", 10),
}
"""The method of each bar, and its T."""


def step_time(record: Record) -> Any:
    """Draw the mean step of each method over that of Muon, or of IFShampoo at T = 1 if Muon was not measured."""
    workload = measured_workload(record, "1024×4096", "GPT-2 124M", "1024²")
    times = {}
    for label, (method, period) in STEP_TIMES.items() if workload else ():
        if row := best(record, workload, METHODS[method], partial(mean_step, period=period)):
            times[label] = mean_step(row, period)
    unit = next((label for label in ("Muon", "IFShampoo, paper's rule") if label in times), None)
    ratios = {label: time / times[unit] for label, time in times.items()} if unit else {}
    found = [Bar(label, ratio, _short(ratio)) for label, ratio in ratios.items()]
    xlabel = f"{workload} in blocks of 1024. T = 10: matrices are refreshed every 10th step, else every step"
    return bars(f"Time of an optimizer step, {unit} = 1", xlabel, found)


def _short(ratio: float) -> str:
    """Return a ratio with two decimals, or with one significant digit if it is below 0.01."""
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}" if ratio >= 0.01 else f"{ratio:.1g}"


PEERS = ("AdamW", "Muon", "Distributed Shampoo (Meta)", "sirfshampoo", "SOAP")
STATES = (
    ("IFShampoo, least memory", (LEAST,), "state_bytes"),
    ("IFShampoo", (DEFAULT,), "state_bytes at T = 1"),
    ("IFShampoo, T = 10", (DEFAULT,), "state_bytes"),
    *((label, METHODS[label], "state_bytes") for label in PEERS),
)


def memory(record: Record) -> Any:
    """Draw the state of each method in bytes a weight."""
    workload = measured_workload(record, "1024²")
    found = []
    for label, names, column in STATES if workload else ():
        row = best(record, workload, names, lambda row: row["state_bytes"])
        if row and column in row:
            found.append(Bar(label, row[column], f"{row[column]:.4g}"))
    return bars(f"Optimizer state of a {workload} weight, momentum included", "bytes a weight", found)


def roofline(record: Record) -> Any:
    """Draw the fractions of the roofline, cut at 1: a step whose data stays in the cache can be faster."""
    workload = measured_workload(record, "GPT-2 124M", "1024×4096", "1024²")
    found = []
    for name in (DEFAULT, FP32, "RFRMSProp", "AdamW, fused", "SGD, fused") if workload else ():
        row = pick(record, workload, name, 1024) or {}
        for kind in (UPDATE, OTHER) if ENTRIES[name].has_period else (UPDATE,):
            if (fraction := row.get(f"roofline of {kind}")) is not None:
                label = f"{name}, {'update' if kind == UPDATE else 'other step'}" if ENTRIES[name].has_period else name
                text = f"{fraction:.2f}" if fraction <= 1 else f"{fraction:.2f}, from the cache"
                found.append(Bar(label, min(fraction, 1.0), text))
    return bars(f"Fraction of the roofline, {workload}", "least possible time / measured time", found)


# ---- lines -------------------------------------------------------------------------------------------------------


def _draw(axes: Any, label: str, xs: Iterable[float], times: Iterable[float]) -> None:
    """Draw a line in the colour of its method, ours thick."""
    ours = label.startswith(("IFShampoo", "RFRMSProp"))
    style = {"linewidth": 2.6} if ours else {"linewidth": 1.4, "linestyle": "--"}
    axes.plot([*xs], [time / 1e3 for time in times], color=f"C{[*METHODS].index(label)}", label=label, **style)


def _finish(axes: Any, ticks: Iterable[int], **labels: str) -> None:
    axes.set(xscale="log", yscale="log", **labels)
    axes.set_xticks([*ticks], [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _add_legend(figure: Any) -> None:
    axes = figure.axes[0]
    axes.set_ylabel("ms")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def time_by_size(record: Record) -> Any:
    """Draw the update and the other step against the width of one weight."""
    rows = [row for row in record["scaling"].get("width", []) if UPDATE in row]
    if not rows:
        return None
    figure, columns = _figure(8, 4.8, columns=2)
    for axes, kind, title in zip(columns, (UPDATE, OTHER), ("update", "other step"), strict=True):
        for label, names in METHODS.items():
            lines = [[(x["size"], x[kind]["median"]) for x in rows if x["optimizer"] == name] for name in names]
            points = min(lines, key=lambda line: (-len(line), line[-1:]))  # the longest, and of these the fastest
            if points:
                _draw(axes, label, *zip(*points, strict=True))
        _finish(axes, sorted({row["size"] for row in rows}), title=title, xlabel="n of an n × n weight")
    _add_legend(figure)
    return figure


def time_by_period(record: Record) -> Any:
    """Draw the mean step against T."""
    workload = measured_workload(record, "GPT-2 124M", "1024×4096", "1024²")
    if workload is None:
        return None
    figure, axes = _figure(8, 4.8)
    for label, names in METHODS.items():
        if row := best(record, workload, names, partial(mean_step, period=10)):
            _draw(axes, label, PERIODS, [mean_step(row, period) for period in PERIODS])
    title = f"Mean step, {workload}, blocks of 1024"
    _finish(axes, PERIODS, title=title, xlabel="T, steps between updates of the factors")
    _add_legend(figure)
    return figure


PLOTS: tuple[tuple[str, str, Callable[[Record], Any]], ...] = (
    ("step-time.png", "Time of an optimizer step relative to Muon", step_time),
    ("memory.png", "Optimizer state in bytes a weight", memory),
    ("time-by-size.png", "Time of a step against the width of a weight", time_by_size),
    ("time-by-period.png", "Mean step against T", time_by_period),
    ("roofline.png", "Fraction of the roofline", roofline),
)
