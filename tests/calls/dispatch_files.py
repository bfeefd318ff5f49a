"""Dispatch tables for tests, and files that contain them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rootfree_kernels.ops import dispatch

GPU = "NVIDIA H100 80GB HBM3"

Use = Callable[..., Path]


def entry(choice: str | None, **sizes: int) -> dict[str, Any]:
    return {**sizes, "choice": choice}


def table(device: str = GPU, **operations: Any) -> dict[str, Any]:
    records = [{"record": "a.json", "date": "2026-12-01"}, {"record": "b.json", "date": "2026-12-02"}]
    return {"device": device, "records": records, "operations": operations}


def user_of_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    """Return a function that writes a dispatch table, or any other value, to the file in ROOTFREE_DISPATCH."""

    def use(value: Any = None, **operations: Any) -> Path:
        dispatch.read.cache_clear()
        path = folder / "table.json"
        value = table(**operations) if value is None else value
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        monkeypatch.setenv("ROOTFREE_DISPATCH", str(path))
        return path

    monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)
    return use
