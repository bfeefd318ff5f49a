"""The targets of the project, and the rows of a record that show whether they are met."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bench.common.optimizers import ENTRIES, WHOLE
from bench.common.report import Target
from bench.compare.contest import OTHER, UPDATE, mean_step
from bench.compare.training import BASELINE

Row = dict[str, Any]
Record = dict[str, Any]

DEFAULT, FP32, LEAST = "IFShampoo", "IFShampoo, FP32 factors", "IFShampoo, least memory"
META = "Distributed Shampoo"
PACKED = 12 + 8 / 1024
"""Bytes a weight that Distributed Shampoo keeps of a 1024² weight: an FP32 momentum and four FP32 triangles of
n(n + 1)/2."""

LEAST_POSSIBLE = 8.002
"""Bytes a weight of two BF16 factors, two BF16 triangles of n(n + 1)/2 and a BF16 momentum of a 1024² weight: 8 + 2/n,
rounded. The setting with the least memory cannot go below."""


# ---- finding rows ------------------------------------------------------------------------------------------------


def measured_rows(record: Record, workload: str) -> list[Row]:
    """Return the rows of a workload that have figures; of a case that is in every round, the first."""
    rows = [row for row in record["steps"] if row["workload"] == workload and UPDATE in row]
    return [*{(row["optimizer"], row["block"]): row for row in reversed(rows)}.values()][::-1]


def pick(record: Record, workload: str, optimizer: str, block: int, round_: int | None = None) -> Row | None:
    """Return the row of an optimizer at a block size, preferably of this round.

    A row with another block size will do if neither size cuts the workload.
    """
    rows = [row for row in record["steps"] if row["workload"] == workload and row["optimizer"] == optimizer]
    rows = [row for row in rows if UPDATE in row]
    is_cut = rows and ENTRIES[optimizer].family != "diagonal" and record["workloads"][workload]["longest_side"] > block
    fitting = [row for row in rows if row["block"] == block or (row["uncut"] and not is_cut)]
    return min(fitting, key=lambda row: (row["block"] != block, row["round"] != round_), default=None)


# ---- targets -----------------------------------------------------------------------------------------------------

Line = tuple[str, float | None, Target | None]
"""A statement, what was measured of it (None if nothing was), and the bound (None if there is none)."""


def targets(record: Record) -> list[Line]:
    gpu = record["device_type"] == "cuda"
    return [*_memory_targets(record), *(_gpu_targets(record) if gpu else _cpu_targets(record))]


def _memory_targets(record: Record) -> list[Line]:
    default, least = (pick(record, "1024²", name, 1024) for name in (DEFAULT, LEAST))
    return [
        ("State of a 1024² weight, IFShampoo as it is (T = 1), bytes a weight: at most Meta's packed",
         default and default.get("state_bytes at T = 1"), Target("≤", PACKED)),
        ("State of a 1024² weight, IFShampoo with the least memory, bytes a weight",
         least and least["state_bytes"], Target("≤", LEAST_POSSIBLE)),
    ]  # fmt: skip


def _speedup(record: Record, workload: str, ours: str, theirs: str, block: int, of: Callable[[Row], float]) -> Any:
    """Return their time over ours in the same round, for the fastest optimizer at this block whose name begins so."""
    names = {row["optimizer"] for row in measured_rows(record, workload) if row["optimizer"].startswith(theirs)}
    rows = [row for name in names if (row := pick(record, workload, name, block))]
    ratios = [of(row) / of(mine) for row in rows if (mine := pick(record, workload, ours, block, row["round"]))]
    return min(ratios, default=None)


def _cpu_targets(record: Record) -> list[Line]:
    against, at_ten = partial(_speedup, record, "1024×4096", FP32), partial(mean_step, period=10)
    return [
        (f"1024×4096, FP32, blocks of 1024, T = 10: times as fast as {META}'s fastest",
         against(META, 1024, at_ten), Target("≥", 1.5)),
        ("1024×4096, FP32, whole, T = 10: times as fast as sirfshampoo",
         against("sirfshampoo", WHOLE, at_ten), Target("≥", 1.5)),
    ]  # fmt: skip


def _gpu_targets(record: Record) -> list[Line]:
    name, muon, sirf = "GPT-2 124M", "Muon of Dion, Triton", "sirfshampoo"

    def faster(theirs: str, of: Callable[[Row], float]) -> float | None:
        return _speedup(record, name, DEFAULT, theirs, 1024, of)

    def faster_at(theirs: str, period: int) -> float | None:
        return faster(theirs, partial(mean_step, period=period))

    def slower_at(period: int) -> float | None:
        found = faster_at(muon, period)
        return found and 1 / found

    def training(period: int) -> float | None:
        rows = {row["optimizer"]: row for row in record["training"] if "mean" in row and row["task"] == name}
        ours, theirs = rows.get(f"{DEFAULT}, T = {period}"), rows.get(BASELINE)
        return ours["mean"] / theirs["mean"] if ours and theirs else None

    update, other = (faster(sirf, lambda row, kind=kind: row[kind]["median"]) for kind in (UPDATE, OTHER))
    return [
        (f"{name}, T = 2: times as fast as {META}'s fastest", faster_at(META, 2), Target("≥", 25)),
        (f"{name}, T = 10: times as fast as {META}'s fastest", faster_at(META, 10), Target("≥", 10)),
        (f"{name}, update: times as fast as sirfshampoo", update, Target("≥", 4)),
        (f"{name}, other step: times as fast as sirfshampoo", other, Target("≥", 6)),
        # No bound at T = 1: for a square weight an update and a step take 18n³ operations, and Muon's five iterations
        # 20n³, but they take fewer than ours for other weights, and read and write less.
        (f"{name}, T = 1: time over Dion's Triton Muon", slower_at(1), None),
        (f"{name}, T = 2: time over Dion's Triton Muon", slower_at(2), Target("≤", 1)),
        (f"{name}, T = 10: time over Dion's Triton Muon", slower_at(10), Target("≤", 0.7)),
        (f"{name}, training step of 32k tokens, T = 10: time over AdamW's", training(10), Target("≤", 1.02)),
        (f"{name}, training step of 32k tokens, T = 1: time over AdamW's", training(1), Target("≤", 1.06)),
    ]
