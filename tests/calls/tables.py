"""Helpers for the address tables that the package caches on a device."""

from __future__ import annotations

from typing import Any

import pytest

from rootfree_kernels.pointer_tables import tables

STORES = ("_tables", "_tensor_tables", "_block_tables", "_constants")
"""Names of the caches of tables and constants."""


def forget_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty the caches of tables and constants: tensors of earlier tests may have had the same addresses."""
    for name in STORES:
        monkeypatch.setattr(tables, name, type(getattr(tables, name))())


def note_copies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that records every later copy of a table to the device."""
    copies, copy = [], tables._copied
    monkeypatch.setattr(tables, "_copied", lambda *args: copies.append(args) or copy(*args))
    return copies


def num_kept() -> tuple[int, ...]:
    """Return the number of entries in each cache of tables and constants."""
    return tuple(len(getattr(tables, name)) for name in STORES)
