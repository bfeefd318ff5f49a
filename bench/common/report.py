"""The tables of all benchmarks: one writer of Markdown tables, and rows of figures with their targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.record import write_json
from bench.common.timing import Timing


class Target(NamedTuple):
    """A bound of a value: "≥" or "≤" and a number."""

    sign: str
    bound: float

    def is_met(self, value: Any) -> bool:
        number = value.median if isinstance(value, Timing) else value
        if not isinstance(number, int | float) or math.isnan(number):
            return False
        return number >= self.bound if self.sign == "≥" else number <= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


class Alternatives(NamedTuple):
    """Times of different ways to do the same work, measured in turn, for `bench.make_dispatch_table`.

    Operation, sizes and choices are those of `rootfree_kernels.ops.dispatch`.
    """

    operation: str
    sizes: dict[str, int]
    times: dict[str, Timing]
    """By choice."""

    def as_json(self) -> dict[str, Any]:
        times = {choice: timing._asdict() for choice, timing in self.times.items()}
        return {"operation": self.operation, "sizes": self.sizes, "times": times}


@dataclass
class Row:
    """One case of a table: values by column (a number, a text, or a `Timing` in µs), or the error."""

    table: str
    case: str
    cells: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    """By column."""
    error: str = ""
    note: str = ""
    alternatives: Alternatives | None = None

    def as_json(self) -> dict[str, Any]:
        cells = {name: x._asdict() if isinstance(x, Timing) else x for name, x in self.cells.items()}
        targets = {
            column: {"bound": str(target), "met": target.is_met(self.cells.get(column))}
            for column, target in self.targets.items()
        }
        row = {"table": self.table, "case": self.case, "values": cells, "targets": targets}
        if self.alternatives:
            row["alternatives"] = self.alternatives.as_json()
        return row | {name: text for name, text in (("error", self.error), ("note", self.note)) if text}


def number(value: float) -> str:
    """Return a value with three significant digits, or as a whole number."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}" if abs(value) >= 0.01 else f"{value:.1e}"


def cell(value: Any) -> str:
    """Return a value as text; a time as its median with the 10th and the 90th percentile."""
    if isinstance(value, Timing):
        gaps = "" if value.queued else " with gaps"
        return f"{number(value.median)} ({number(value.p10)}–{number(value.p90)}){gaps}"
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value)


def _cell_with_target(row: Row, column: str) -> str:
    text = cell(row.cells[column]) if column in row.cells else ""
    target = row.targets.get(column)
    if target is None:
        return text
    met = target.is_met(row.cells.get(column))
    return f"{text} ({target}: met)" if met else f"**{text} ({target}: missed)**"


def table(columns: Sequence[str], rows: Iterable[Sequence[str] | str]) -> list[str]:
    """Return the lines of a Markdown table whose columns are aligned, so that it is easy to read in a terminal too.

    A row that is a string is a heading between rows: it is shown as it is.
    """
    lines = [row if isinstance(row, str) else [text.replace("|", "\\|") for text in row] for row in (columns, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*(x for x in lines if isinstance(x, list)), strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return [x if isinstance(x, str) else f"| {' | '.join(map(str.ljust, x, widths))} |" for x in lines]


def section(name: str, rows: list[Row], note: str) -> list[str]:
    """Return the lines of one table: heading, note, table and failures."""
    columns = list(dict.fromkeys(column for row in rows for column in (*row.cells, *row.targets)))
    lines = [f"### {name}", ""]
    if note:
        lines += [note, ""]
    measured = [row for row in rows if row.cells or row.targets]
    if measured:
        cells = [[row.case, *(_cell_with_target(row, column) for column in columns)] for row in measured]
        lines += table(["case", *columns], cells)
    notes = [f"- {row.case}: {row.note}" for row in rows if row.note]
    failures = [f"- **{row.case}: not measured.** {_one_line(row.error)}" for row in rows if row.error]
    return [*lines, *([""] if measured and (notes or failures) else []), *notes, *failures, ""]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def summary(rows: list[Row]) -> list[str]:
    """Return a table of all targets, and the list of what was not measured."""
    every = [(row, column, target) for row in rows for column, target in row.targets.items()]
    met = sum(target.is_met(row.cells.get(column)) for row, column, target in every)
    failed = [row for row in rows if row.error]
    lines = ["### Targets", "", f"{met} of {len(every)} met; {len(failed)} cases were not measured.", ""]
    lines += [f"- {row.table}, {row.case}: {_one_line(row.error)[:300]}" for row in failed]
    if not every:
        return [*lines, ""]
    lines += [""] if failed else []
    cells = []
    for row, column, target in every:
        value = row.cells.get(column)
        verdict = "met" if target.is_met(value) else "**missed**"
        cells.append([row.table, row.case, column, cell(value), str(target), verdict])
    return [*lines, *table(("table", "case", "value", "measured", "target", ""), cells), ""]


PROVENANCE = ("device", "driver", "cuda", "torch", "triton", "python", "commit", "date", "command")


def markdown(record: Mapping[str, Any], rows: list[Row], notes: Mapping[str, str]) -> str:
    """Return the page of a record: its origin, all targets, and each table with its note."""
    lines = [f"# Kernels on {record.get('device', 'an unknown device')}", ""]
    lines += table(("", ""), [(name, str(record.get(name, "unknown"))) for name in PROVENANCE])
    lines += [
        "",
        "Times in µs: median (10th–90th percentile) of device events around calls queued ahead, inputs in turn. "
        '"With gaps": the host could not queue ahead, and its gaps are in the time.',
        "",
        *summary(rows),
    ]
    for name in dict.fromkeys(row.table for row in rows):
        lines += section(name, [row for row in rows if row.table == name], notes.get(name, ""))
    return "\n".join(lines).rstrip() + "\n"


def write(record: Mapping[str, Any], rows: list[Row], notes: Mapping[str, str], path: Path) -> None:
    """Write a record as JSON to `path`, and as Markdown beside it."""
    write_json(path, {**record, "rows": [row.as_json() for row in rows]})
    path.with_suffix(".md").write_text(markdown(record, rows, notes), encoding="utf-8")
