"""Make the dispatch table of a device from the records that `make gpu` and `make gpu-bench` wrote there.

    python -m bench.make_dispatch_table RECORD.json [RECORD.json ...] [--out FILE]

Writes rootfree_kernels/ops/dispatch_tables/<device>.json, where the package finds it, or FILE, for ROOTFREE_DISPATCH.
Each class of shapes with measured alternatives gets an entry, with all their times. The entry has a choice if that
choice is clearly faster in one case of the class and slower in none: by more than 3% of the median, with its 90th
percentile below the other's 10th. Otherwise, and if a case was timed with gaps of the host or fewer than ten times, the
choice is null and the order of preference stands. Rows without alternatives are passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.record import write_json
from rootfree_kernels.ops.dispatch import OPERATIONS, TABLES, DispatchTableError, parse, size_class, slug

MARGIN = 1.03
"""How many times as long the other choice must take."""

MIN_SAMPLES = 10
"""Fewer samples give no meaningful 10th and 90th percentile."""

PROVENANCE = ("date", "commit", "driver", "cuda", "torch", "triton")


class RecordError(Exception):
    """A record cannot be read, or no table can be made of it."""


class Case(NamedTuple):
    """The alternatives of one row of a record: quantiles of their times in µs, by choice."""

    record: str
    name: str
    times: dict[str, dict[str, Any]]

    def is_usable(self) -> bool:
        return all(time.get("queued") and time.get("samples", 0) >= MIN_SAMPLES for time in self.times.values())

    def ratio(self) -> float:
        """Return the time of the second fastest choice over that of the fastest."""
        first, second, *_ = sorted(time["median"] for time in self.times.values())
        return second / first

    def as_json(self) -> dict[str, Any]:
        quantiles = ("median", "p10", "p90")
        times = {choice: {q: round(time[q], 3) for q in quantiles} for choice, time in self.times.items()}
        fastest = min(self.times, key=lambda choice: self.times[choice]["median"])
        found = {"case": self.name, "record": self.record, "µs": times}
        found |= {"fastest": fastest, "ratio": round(self.ratio(), 3)}
        return found if self.is_usable() else {**found, "unusable": "timed with gaps, or too few times"}


Class = tuple[int, ...]
Classes = dict[str, dict[Class, list[Case]]]
"""The cases of every operation, by the upper ends of their classes of sizes."""


# ---- reading records ---------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        RecordError: the file is no record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("device"), str):
        raise RecordError(f"{path} names no device: pass a record of bench.kernels or bench.compare.")
    return record


def read_all(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return records by the names of their files."""
    names = [path.name for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RecordError(f"several records are called {' and '.join(sorted(twice))}: give them names of their own.")
    return {path.name: read(path) for path in paths}


def alternatives(record: Mapping[str, Any], name: str) -> Iterator[tuple[str, Class, Case]]:
    """Yield (operation, class, case) of the rows of a record that have alternatives."""
    rows = record.get("rows")
    for row in rows if isinstance(rows, list) else ():
        found = row.get("alternatives") if isinstance(row, dict) else None
        if not isinstance(found, dict) or not {"operation", "sizes", "times"} <= set(found):
            continue
        case = Case(name, f"{row.get('table')}, {row.get('case')}", found["times"])
        if (operation := found["operation"]) not in OPERATIONS:
            raise RecordError(f"{name}, {case.name}: operation {operation!r} is unknown; use the version it is of.")
        sizes = [found["sizes"][size] for size in OPERATIONS[operation].sizes]
        yield operation, tuple(1 << size_class(size) for size in sizes), case


# ---- the table ---------------------------------------------------------------------------------------------------


def beats(choice: str, other: str, cases: Sequence[Case]) -> bool:
    """Return whether a choice is clearly faster than another in one case, and slower in none."""
    pairs = [(case.times[choice], case.times[other]) for case in cases]
    if any(ours["median"] > theirs["median"] for ours, theirs in pairs):
        return False
    return any(theirs["median"] > MARGIN * ours["median"] and ours["p90"] < theirs["p10"] for ours, theirs in pairs)


def verdict(cases: Sequence[Case]) -> str | None:
    """Return the choice that beats all others, None if there is none."""
    choices = {choice for case in cases for choice in case.times}
    if not all(case.is_usable() and set(case.times) == choices for case in cases):
        return None
    return next((x for x in sorted(choices) if all(beats(x, other, cases) for other in choices - {x})), None)


def table(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of a table's file, made of records by their names.

    Raises:
        RecordError: the records are of several devices, or have no alternatives.
    """
    devices = {slug(record["device"]): record["device"] for record in records.values()}
    if len(devices) > 1:
        raise RecordError(f"records of {' and '.join(devices.values())}: a table is that of one device.")
    classes: Classes = defaultdict(lambda: defaultdict(list))
    for name, record in records.items():
        for operation, sizes, case in alternatives(record, name):
            classes[operation][sizes].append(case)
    if not classes:
        raise RecordError(
            f"no alternatives in {', '.join(records)}: pass records of this version's bench.kernels or bench.compare."
        )
    origins = [{"record": name, **{key: x.get(key) for key in PROVENANCE}} for name, x in records.items()]
    operations: dict[str, list[dict[str, Any]]] = {name: [] for name in OPERATIONS if name in classes}
    for name, entries in operations.items():
        for sizes, cases in sorted(classes[name].items()):
            measured = {"choice": verdict(cases), "measured": [case.as_json() for case in cases]}
            entries.append(dict(zip(OPERATIONS[name].sizes, sizes, strict=True)) | measured)
    return {"device": next(iter(devices.values())), "records": origins, "operations": operations}


# ---- command line ------------------------------------------------------------------------------------------------


def summary(made: Mapping[str, Any]) -> list[str]:
    """Return a line for every entry."""
    lines = []
    for operation, entries in made["operations"].items():
        for entry in entries:
            sizes = ", ".join(f"{name} ≤ {entry[name]}" for name in OPERATIONS[operation].sizes)
            ratios = ", ".join(f"{case['fastest']} by {case['ratio']:.2f}" for case in entry["measured"])
            lines.append(f"{operation}, {sizes}: {entry['choice'] or 'order of preference'} ({ratios})")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table, and return the exit status: 0 if there was something to write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "records", type=Path, nargs="+", metavar="RECORD.json", help="records of bench.kernels and bench.compare"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default: the device's in {TABLES}")
    options = parser.parse_args(arguments)
    try:
        made = table(read_all(options.records))
        path = options.out or TABLES / f"{slug(made['device'])}.json"
        parse(made, str(path))  # a record of other choices than this version's makes no table
    except (RecordError, DispatchTableError) as error:
        print(f"✗ {error}")
        return 1
    write_json(path, made)
    print("\n".join([*summary(made), f"Wrote {path}."]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
