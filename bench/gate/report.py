"""The bounds that compiled kernels must meet, the table of the gates, and their common command line.

Columns: registers, a thread; stack and shared, bytes a thread and a block; tmem, columns of sm_100's tensor memory; and
numbers of instructions. spills: accesses to local memory (AMD: spilled registers); mma: the tensor-core instruction of
this generation; old mma: of an earlier one; async: asynchronous copies to shared memory; loads128, stores128: accesses
to global memory of 128 bits or more.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.common import report
from bench.common.report import Target
from bench.gate.machine_code import TARGETS

COLUMNS = ("registers", "stack", "spills", "shared", "tmem", "mma", "old mma", "async", "loads128", "stores128")


def bounds(kind: str, target: str) -> dict[str, Target]:
    """Return the bounds of a kernel of `kind`, by column."""
    nvidia, none = TARGETS[target].backend == "cuda", Target("≤", 0)
    limits = {"stack": none, "spills": none, "shared": Target("≤", TARGETS[target].max_shared)}
    if target == "sm_100":
        limits["tmem"] = Target("≤", 512)
    if kind == "matrix":
        limits["mma"] = Target("≥", 1)
        if target in ("sm_90", "sm_100"):
            limits["old mma"] = none
        if nvidia:  # Triton copies through registers for gfx942
            limits["async"] = Target("≥", 1)
    if kind == "elementwise":
        limits["loads128"] = Target("≥", 1)
        if nvidia:  # the block that gives a thread 128 bits of BF16 in a warp of 32 gives it 64 bits in one of 64
            limits["stores128"] = Target("≥", 1)
    return limits


@dataclass
class Row:
    """One configuration on one target: the measured numbers by column, or the error."""

    kernel: str
    kind: str
    configuration: str
    target: str
    seconds: float = 0.0
    """The time of the compilation; next to none if it came from a cache."""
    measured: dict[str, int] = field(default_factory=dict)
    error: str = ""

    @property
    def violations(self) -> list[str]:
        """Return the columns whose bound is broken; "error" if nothing was measured."""
        if self.error:
            return ["error"]
        limits = bounds(self.kind, self.target)
        return [column for column, bound in limits.items() if not bound.is_met(self.measured[column])]


# ---- the table -----------------------------------------------------------------------------------------------------


def worst(rows: Sequence[Row]) -> Row:
    """Return a row with the worst number of each bounded column, and of registers, of rows of one kind and target."""
    limits = {"registers": Target("≤", 0), **bounds(rows[0].kind, rows[0].target)}
    measured = [row.measured for row in rows if not row.error]
    worst_of = {"≤": max, "≥": min}
    numbers = {column: worst_of[x.sign](each[column] for each in measured) for column, x in limits.items() if measured}
    return replace(rows[0], measured=numbers, error="")


def cells(row: Row) -> list[str]:
    """Return a line of the table: the target, and every number with its bound, and a cross if it is broken."""
    limits = bounds(row.kind, row.target)
    line = [row.target]
    for column in COLUMNS:
        text = f"{row.measured[column]:,}" if column in row.measured else ""
        if text and (bound := limits.get(column)):
            text = f"{'' if bound.is_met(row.measured[column]) else '✗ '}{text} {bound.sign}{bound.bound:,}"
        line.append(text)
    return line


def table(rows: Sequence[Row], every: bool) -> list[str]:
    """Return the lines of the table: of each kernel the worst configuration, and all that break a bound, or all."""
    lines: list[str | list[str]] = []
    for (kernel, kind), group in grouped(rows, lambda row: (row.kernel, row.kind)):
        configurations = grouped(group, lambda row: row.configuration)
        lines.append(f"{kernel} ({kind}), worst of {len(configurations)}")
        lines += [cells(worst(same)) for _, same in grouped(group, lambda row: row.target)]
        for configuration, same in configurations:
            shown = [row for row in same if every or row.violations]
            if shown:
                lines.append(f"  {'✗ ' if any(row.violations for row in same) else ''}{configuration}")
            for row in shown:
                lines.append(textwrap.indent(f"{row.target}  ✗ {row.error}", "  ") if row.error else cells(row))
    return report.table(("", *COLUMNS), lines)


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


# ---- command line --------------------------------------------------------------------------------------------------


def gate_parser(description: str, targets: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser of the options of both gates."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", default="", metavar="PATTERN", help="configurations in whose line this occurs")
    parser.add_argument("--targets", default=",".join(targets), help="some of %(default)s")
    parser.add_argument("--all", action="store_true", help="show every configuration")
    return parser


def conclude(what: str, seconds: float, rows: Sequence[Row], every: bool) -> int:
    """Print the table and the verdict, and return the exit status."""
    if rows:
        print("\n".join(table(rows, every)))
    failed = sum(bool(row.violations) for row in rows)
    verdict = f"✗ {failed} of {len(rows)} do not pass" if failed else "all pass"
    print(f"{what} in {seconds} s: {verdict}")
    return int(failed > 0)
