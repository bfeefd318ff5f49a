"""Which of several ways to do the same work is taken on a device, where that was measured.

A table belongs to a device by its name, and says for an operation and a class of shapes what was fastest there.
`python -m bench.dispatch` makes it of the records of `make gpu`.

    operation   choices                     by
    diagonal    triton, cuda, cpp, eager    `numbers` in all and number of `tensors` of the list
    matrices    triton, cpp, eager          the longer `side` of a batch's blocks, and their number `blocks`
    symmetric   triton, bmm                 the same: how Triton's backend makes P_C = CCᵀ and P_K = KKᵀ, by a kernel of
                                            its own that saves half the work, or by cuBLAS

Sizes fall into classes that end with the powers of two: 513 to 1024 are one. A shape takes the choice of the nearest
class of the table that differs by at most one doubling in every size, the nearest being that of the fewest doublings in
all; where there is none, or the nearest ones disagree, the order of preference stands (see `backends.PREFERENCE`). It
stands as well where a choice cannot run, and a table is not asked where `fused=False` or ROOTFREE_BACKEND decides.

ROOTFREE_DISPATCH=off does without tables, ROOTFREE_DISPATCH=FILE.json takes that one for devices of its name instead of
those of this package. Tables are read once, and asked once for a plan or a batch, never in a step.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.backends import FactorDtypes, choose, forced

TABLES = Path(__file__).with_name("dispatch_tables")
REMEDY = "Make the table anew (python -m bench.dispatch), or do without: ROOTFREE_DISPATCH=off."
MAX_DOUBLINGS = 1
"""By how many a shape may differ from a class, in each of its sizes, to take its choice."""


class Operation(NamedTuple):
    """What a table decides: by which sizes, between which choices."""

    sizes: tuple[str, ...]
    choices: tuple[str, ...]


OPERATIONS = {
    "diagonal": Operation(("numbers", "tensors"), ("triton", "cuda", "cpp", "eager")),
    "matrices": Operation(("side", "blocks"), ("triton", "cpp", "eager")),
    "symmetric": Operation(("side", "blocks"), ("triton", "bmm")),
}


class DispatchTableError(ValueError):
    """A table cannot be read; the message names the file, the entry and the remedy."""


class Entry(NamedTuple):
    """What was fastest in a class of shapes: None where nothing was by a clear margin."""

    classes: tuple[int, ...]  # of each of the operation's sizes
    choice: str | None


class Table(NamedTuple):
    """The entries of a device, by operation, and where they come from."""

    path: str
    device: str
    date: str
    entries: Mapping[str, Sequence[Entry]]

    def choice(self, operation: str, sizes: Mapping[str, int]) -> str | None:
        """What to take for a shape; None leaves it to the order of preference."""
        wanted = [size_class(sizes[name]) for name in OPERATIONS[operation].sizes]
        near: dict[int, set[str | None]] = defaultdict(set)
        for entry in self.entries.get(operation, ()):
            doublings = [abs(ours - theirs) for ours, theirs in zip(wanted, entry.classes, strict=True)]
            if max(doublings) <= MAX_DOUBLINGS:
                near[sum(doublings)].add(entry.choice)
        nearest = near[min(near)] if near else set()
        return nearest.pop() if len(nearest) == 1 else None


def size_class(size: int) -> int:
    """The k of the class 2ᵏ⁻¹ < size ≤ 2ᵏ."""
    return (size - 1).bit_length()


# ---- reading a table ---------------------------------------------------------------------------------------------


def parse(value: Any, path: str) -> Table:
    """The table of what a file holds.

    Raises:
        DispatchTableError: it is not one.
    """
    _check(isinstance(value, dict), path, f"it is a {type(value).__name__}, not an object")
    device, operations = value.get("device"), value.get("operations")
    _check(isinstance(device, str), path, f"device is {device!r}: write the device's name")
    _check(isinstance(operations, dict), path, f"operations is {operations!r}: write an object with a list for each")
    entries = {name: _entries(name, listed, path) for name, listed in operations.items()}
    records = value.get("records")
    dates = [x["date"] for x in records if isinstance(x, dict) and "date" in x] if isinstance(records, list) else []
    return Table(path, device, ", ".join(dict.fromkeys(map(str, dates))), entries)


def _entries(operation: str, listed: Any, path: str) -> list[Entry]:
    known = ", ".join(OPERATIONS)
    _check(operation in OPERATIONS, path, f"operation {operation!r} is unknown: write {known}")
    _check(isinstance(listed, list), path, f"{operation} is {listed!r}: write a list of entries")
    return [_entry(OPERATIONS[operation], item, f"{path}, {operation}[{index}]") for index, item in enumerate(listed)]


def _entry(operation: Operation, item: Any, where: str) -> Entry:
    _check(isinstance(item, dict), where, f"it is {item!r}: write an object")
    for name in operation.sizes:
        size = item.get(name)
        is_class = isinstance(size, int) and not isinstance(size, bool) and size > 0 and not size & (size - 1)
        _check(is_class, where, f"{name} is {size!r}: write a power of two, the upper end of a class of sizes")
    choice, known = item.get("choice"), ", ".join(operation.choices)
    _check("choice" in item, where, f"choice is missing: write {known} or null")
    is_known = choice is None or choice in operation.choices
    _check(is_known, where, f"choice {choice!r} is unknown: write {known} or null")
    return Entry(tuple(size_class(item[name]) for name in operation.sizes), choice)


def _check(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise DispatchTableError(f"dispatch table {where}: {problem}. {REMEDY}")


@cache
def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        DispatchTableError: the file cannot be read, or is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DispatchTableError(f"dispatch table {path}: {error}. {REMEDY}") from error
    return parse(value, str(path))


# ---- the table of a device ---------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A name of a device as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def processor() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name that tables know a device by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor() if device.type == "cpu" else device.type


class _Use(NamedTuple):
    """The table that is asked on a device, or why none is."""

    table: Table | None
    reason: str = ""


def _in_use(device: torch.device, fused: bool | None) -> _Use:
    if backend := forced(fused):
        return _Use(None, f"the backend is fixed, {backend}")
    chosen = os.environ.get("ROOTFREE_DISPATCH")
    if chosen == "off":
        return _Use(None, "ROOTFREE_DISPATCH=off")
    name = device_name(device)
    path = Path(chosen) if chosen else TABLES / f"{slug(name)}.json"
    if not chosen and not path.is_file():
        return _Use(None, "order of preference")
    table = read(path)
    if slug(table.device) != slug(name):
        return _Use(None, f"{path} is that of {table.device}")
    return _Use(table)


def check(device: torch.device, fused: bool | None = None) -> None:
    """Read the table that plans for a device will be made by.

    Raises:
        DispatchTableError: it cannot be read.
    """
    _in_use(device, fused)


def describe(device: torch.device) -> str:
    """The table in use on a device, in a line, or "none" and why."""
    table, reason = _in_use(device, None)
    if table is None:
        return f"none: {reason}"
    counts = [f"{name} {sum(entry.choice is not None for entry in table.entries[name])}" for name in table.entries]
    return f"{table.path}, measured {table.date or 'at an unknown date'}; choices: {', '.join(counts) or 'none'}"


# ---- what is taken -----------------------------------------------------------------------------------------------


def _choice(operation: str, device: torch.device, fused: bool | None, **sizes: int) -> str | None:
    table = _in_use(device, fused).table
    return table.choice(operation, sizes) if table else None


def for_diagonal(params: Sequence[Tensor], dtype: torch.dtype, fused: bool | None = None) -> str:
    """The backend of the diagonal step of a list of tensors of one device; `dtype` is that of its arithmetic.

    Raises:
        RuntimeError, ImportError: as `backends.choose`.
    """
    device = params[0].device
    numbers = sum(map(Tensor.numel, params))
    return choose(device, dtype, fused, None, _choice("diagonal", device, fused, numbers=numbers, tensors=len(params)))


def for_matrices(
    device: torch.device,
    dtype: torch.dtype,
    fused: bool | None,
    factors: FactorDtypes,
    block_shape: tuple[int, int],
    num_blocks: int,
) -> str:
    """The backend of a batch of blocks, likewise; `triton_bmm` is Triton's with the symmetric products by cuBLAS."""
    sizes = {"side": max(block_shape), "blocks": num_blocks}
    backend = choose(device, dtype, fused, factors, _choice("matrices", device, fused, **sizes))
    by_bmm = backend == "triton" and _choice("symmetric", device, fused, **sizes) == "bmm"
    return "triton_bmm" if by_bmm else backend
