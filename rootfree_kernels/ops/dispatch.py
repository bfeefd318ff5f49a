"""Measured choices: which of several ways to do the same work is fastest on a device.

A table belongs to a device by its name. For an operation and a class of shapes it says what was fastest there.
`python -m bench.make_dispatch_table` makes it from the records of `make gpu`.

    operation   choices                     by
    diagonal    triton, cuda, cpp, eager    `numbers`, the elements of the list in all, and its number of `tensors`
    matrices    triton, cpp, eager          the longer `side` of a batch's blocks, and their number `blocks`
    symmetric   triton, bmm                 the same sizes: how the Triton backend computes P_C = CCᵀ and P_K = KKᵀ, by
                                            its own kernel, which saves half of the work, or by cuBLAS

Sizes fall into classes that end at the powers of two: 513 to 1024 are one class. A shape takes the choice of the
nearest class in the table. A class is near if every size differs by at most one doubling, and nearest with the fewest
doublings in all. If there is none, or if the nearest ones disagree, the order of preference decides
(`backends.BACKENDS`). It also decides if a choice cannot run. No table is read if `fused=False` or ROOTFREE_BACKEND
forces a backend.

ROOTFREE_DISPATCH=off ignores all tables. ROOTFREE_DISPATCH=FILE.json takes that table for devices of its name, and none
of this package. Tables are read once. They are asked once for a plan or a batch, never in a step.
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

from rootfree_kernels.backend import Backend, FactorDtypes
from rootfree_kernels.ops.backends import NAMES, choose, forced, named

TABLES = Path(__file__).with_name("dispatch_tables")
REMEDY = "Make a new table (python -m bench.make_dispatch_table), or ignore it: ROOTFREE_DISPATCH=off."
MAX_DOUBLINGS = 1
"""The most doublings by which each size of a shape may differ from a class whose choice it takes."""


class Operation(NamedTuple):
    """What a table decides: by which sizes, and between which choices."""

    sizes: tuple[str, ...]
    choices: tuple[str, ...]


OPERATIONS = {
    "diagonal": Operation(("numbers", "tensors"), NAMES),
    "matrices": Operation(("side", "blocks"), tuple(name for name in NAMES if named(name).serves_matrices)),
    "symmetric": Operation(("side", "blocks"), ("triton", "bmm")),
}


class DispatchTableError(ValueError):
    """A table cannot be read. The message names the file, the entry and the remedy."""


class Entry(NamedTuple):
    """What was fastest in a class of shapes. None means that nothing was faster by a clear margin."""

    classes: tuple[int, ...]  # of each of the operation's sizes
    choice: str | None


class Table(NamedTuple):
    """The entries of a device by operation, and where they come from."""

    path: str
    device: str
    date: str
    entries: Mapping[str, Sequence[Entry]]

    def choice(self, operation: str, sizes: Mapping[str, int]) -> str | None:
        """Return what to take for a shape. None leaves it to the order of preference."""
        wanted = [size_class(sizes[name]) for name in OPERATIONS[operation].sizes]
        near: dict[int, set[str | None]] = defaultdict(set)
        for entry in self.entries.get(operation, ()):
            doublings = [abs(ours - theirs) for ours, theirs in zip(wanted, entry.classes, strict=True)]
            if max(doublings) <= MAX_DOUBLINGS:
                near[sum(doublings)].add(entry.choice)
        nearest = near[min(near)] if near else set()
        return nearest.pop() if len(nearest) == 1 else None


def size_class(size: int) -> int:
    """Return the k of the class 2ᵏ⁻¹ < size ≤ 2ᵏ."""
    return (size - 1).bit_length()


# ---- reading a table ---------------------------------------------------------------------------------------------


def parse(value: Any, path: str) -> Table:
    """Return the table for the content of a file.

    Raises:
        DispatchTableError: it is not a table.
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
    """Return the table in a file.

    Raises:
        DispatchTableError: the file cannot be read, or it is not a table.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DispatchTableError(f"dispatch table {path}: {error}. {REMEDY}") from error
    return parse(value, str(path))


# ---- the table of a device ---------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """Return the name of a device as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def processor() -> str:
    """Return the name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the name under which tables list a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor() if device.type == "cpu" else device.type


class _Use(NamedTuple):
    """The table in use on a device, or why there is none."""

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
        return _Use(None, f"{path} belongs to {table.device}")
    return _Use(table)


def check(device: torch.device, fused: bool | None = None) -> None:
    """Read the table that plans for a device will use.

    Raises:
        DispatchTableError: it cannot be read.
    """
    _in_use(device, fused)


def describe(device: torch.device) -> str:
    """Return one line on the table in use on a device, or "none" and why."""
    table, reason = _in_use(device, None)
    if table is None:
        return f"none: {reason}"
    counts = [f"{name} {sum(entry.choice is not None for entry in table.entries[name])}" for name in table.entries]
    return f"{table.path}, measured {table.date or 'at an unknown date'}; choices: {', '.join(counts) or 'none'}"


# ---- choices ------------------------------------------------------------------------------------------------------


def _choice(operation: str, device: torch.device, fused: bool | None, **sizes: int) -> str | None:
    table = _in_use(device, fused).table
    return table.choice(operation, sizes) if table else None


def for_diagonal(params: Sequence[Tensor], dtype: torch.dtype, fused: bool | None = None) -> Backend:
    """Return the backend for the diagonal step of a list of tensors on one device. `dtype` is its arithmetic dtype.

    Raises:
        RuntimeError, ImportError: as `backends.choose`.
    """
    device = params[0].device
    elements = sum(map(Tensor.numel, params))
    return choose(device, dtype, fused, None, _choice("diagonal", device, fused, numbers=elements, tensors=len(params)))


def for_matrices(
    device: torch.device,
    dtype: torch.dtype,
    fused: bool | None,
    factors: FactorDtypes,
    block_shape: tuple[int, int],
    num_blocks: int,
) -> Backend:
    """Return the backend for a batch of blocks.

    Raises:
        RuntimeError, ImportError: as `backends.choose`.
    """
    sizes = {"side": max(block_shape), "blocks": num_blocks}
    backend = choose(device, dtype, fused, factors, _choice("matrices", device, fused, **sizes))
    if not backend.variants:
        return backend
    return backend.variants.get(_choice("symmetric", device, fused, **sizes) or "", backend)
