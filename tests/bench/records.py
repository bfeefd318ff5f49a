"""Records of `bench.compare`, written by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.compare.contest import OTHER, UPDATE

SIDES = {"1024²": 1024, "1024×4096": 4096, "GPT-2 124M": 3072, "16²": 16}


def timing(median: float, queued: bool = True) -> dict[str, Any]:
    return {"median": median, "p10": 0.9 * median, "p90": 1.2 * median, "samples": 5, "queued": queued}


def row(
    workload: str, optimizer: str, update: float, other: float, block: int = 1024, **changes: Any
) -> dict[str, Any]:
    """Return the figures of an optimizer, with times in µs."""
    about = {
        "workload": workload,
        "optimizer": optimizer,
        "block": block,
        "uncut": SIDES[workload] <= block,
        "round": 0,
    }
    figures = {UPDATE: timing(update), OTHER: timing(other), "state_bytes": 16.0, "peak_bytes": 30.0}
    counts = {
        f"launches of {UPDATE}": 9,
        f"launches of {OTHER}": 4,
        f"host of {UPDATE}": 55.0,
        f"host of {OTHER}": 20.0,
    }
    return {**about, **figures, **counts, **changes}


def failed(workload: str, optimizer: str, error: str, block: int = 1024) -> dict[str, Any]:
    about = {"workload": workload, "optimizer": optimizer, "block": block, "uncut": False, "round": 0}
    return {**about, "error": error}


def trained(optimizer: str, mean: float, task: str = "GPT-2 124M", **changes: Any) -> dict[str, Any]:
    figures = {"optimizer_share": 0.1, "tokens_per_second": 1e6, "state_bytes": 2e6, "peak_bytes": 3e9}
    return {"optimizer": optimizer, "task": task, "mean": mean, **figures, **changes}


def record(steps: Iterable[dict[str, Any]] = (), device_type: str = "cpu", **changes: Any) -> dict[str, Any]:
    """Return the record of a run that measured only these."""
    return {
        "command": "python -m bench.compare",
        "date": "2026-01-02",
        "commit": "abc1234",
        "processor": "A processor",
        "threads": 2,
        "python": "3.11.1",
        "torch": "2.13.0",
        "device": "A GPU" if device_type == "cuda" else "A processor",
        "device_type": device_type,
        "peers": {},
        "missing": {},
        "missing_modules": [],
        "roofline": None,
        "workloads": {
            name: {"num_matrices": 1, "num_weights": side * 1024, "longest_side": side} for name, side in SIDES.items()
        },
        "steps": [*steps],
        "training": [],
        "scaling": {},
        "errors": {},
        "plots": {},
        "seconds": 12.0,
        **changes,
    }


def scaled(sizes: Iterable[int], name: str = "IFShampoo") -> list[dict[str, Any]]:
    """Return updates of n³ µs and other steps of n²."""
    return [{"size": n, "optimizer": name, UPDATE: timing(n**3), OTHER: timing(n**2)} for n in sizes]


SCALING = {
    "width": [
        *scaled((10, 20, 40)),
        *scaled((10, 20), "RFRMSProp"),
        {"size": 40, "optimizer": "RFRMSProp", "error": "RuntimeError: no"},
    ],
    "T": [{"T": 2, "measured": timing(150.0), "formula": 100.0}],
}
