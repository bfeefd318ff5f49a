"""Tables of addresses that the package keeps on a device."""

from __future__ import annotations

from typing import Any

import pytest

from rootfree_kernels.pointer_tables import tables

STORES = ("_tables", "_tensor_tables", "_block_tables", "_constants")
"""Names of the stores of tables and constants."""


def forget_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep no table and no constant from earlier tests, whose tensors may have had the same addresses."""
    for name in STORES:
        monkeypatch.setattr(tables, name, type(getattr(tables, name))())


def note_copies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which every copy of a table to the device is added from now on."""
    copies, copy = [], tables._copied
    monkeypatch.setattr(tables, "_copied", lambda *args: copies.append(args) or copy(*args))
    return copies


def num_kept() -> tuple[int, ...]:
    """Return how many tables and constants of each kind are kept."""
    return tuple(len(getattr(tables, name)) for name in STORES)
