"""The eager step on one CPU thread against a straightforward implementation of the same formulas.

    python -m bench.cpu_step [--repeats N] [--json FILE]

Both take turns step by step in one process; medians are compared. The last rows compare BF16 with FP32 products on this
processor, which is what `rootfree_kernels.backends.matmul_dtype` decides by.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.naive import NaiveIFShampoo
from bench.record import provenance
from rootfree_kernels import IFShampoo
from rootfree_kernels.backends import matmul_dtype

COMMON = {
    "lr": 1e-3,
    "batch_size": 16,
    "beta2": 0.2,
    "momentum": 0.9,
    "riemannian_momentum": 0.5,
    "damping": 1e-4,
}


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def make(cls: type, num: int, size: int, **options: Any) -> torch.optim.Optimizer:
    """An optimizer over `num` weights of `size`² with fixed random gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, size, generator=generator)) for _ in range(num)]
    for param in params:
        param.grad = torch.randn(size, size, generator=generator) * 0.1
    optimizer: torch.optim.Optimizer = cls(params, **COMMON, **options)
    return optimizer


def step_times(num: int, size: int, frequency: int, cycles: int) -> dict[str, dict[str, float]]:
    """Median seconds of an update, of another step and of a mean step of `frequency`, of both, taking turns."""
    ours = make(IFShampoo, num, size, precondition_frequency=frequency, factor_dtype=torch.float32)
    contestants = {
        "naive": make(NaiveIFShampoo, num, size, precondition_frequency=frequency),
        "rootfree": ours,
    }
    times: dict[str, list[list[float]]] = {name: [] for name in contestants}
    for cycle in range(cycles + 1):
        steps = [[seconds(opt.step) for opt in contestants.values()] for _ in range(frequency)]
        if cycle:  # the first warms up
            for name, column in zip(contestants, zip(*steps, strict=True), strict=True):
                times[name].append(list(column))
    return {
        name: {
            "update": statistics.median(cycle[0] for cycle in cycles_),
            "other": statistics.median(step for cycle in cycles_ for step in cycle[1:]),
            "mean": statistics.median(statistics.mean(cycle) for cycle in cycles_),
        }
        for name, cycles_ in times.items()
    }


def product_times(size: int, repeats: int) -> dict[str, float]:
    """Median seconds of a product of `size`² matrices in BF16 and FP32, taking turns."""
    operands = {dtype: torch.randn(1, size, size, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    for _ in range(repeats + 1):
        for dtype, x in operands.items():
            times[dtype].append(seconds(lambda x=x: torch.bmm(x, x)))  # type: ignore[misc]
    return {str(dtype): statistics.median(values[1:]) for dtype, values in times.items()}


def settle_allocator() -> None:
    """Let the C library see a large tensor come and go, as in any training: it then keeps memory of this size, instead
    of giving it back to the system after every step, which would time page faults."""
    torch.zeros(7 << 20)


def report(rows: list[dict[str, Any]]) -> None:
    print(f"{'case':44} {'ours ms':>9} {'other ms':>9} {'ratio':>6}  target")
    for row in rows:
        target = f"≤ {row['target']}" if row["target"] else ""
        print(f"{row['case']:44} {row['ours'] * 1e3:9.2f} {row['theirs'] * 1e3:9.2f} {row['ratio']:6.2f}  {target}")


def measure(repeats: int) -> list[dict[str, Any]]:
    def row(case: str, ours: float, theirs: float, target: float | None) -> dict[str, Any]:
        return {"case": case, "ours": ours, "theirs": theirs, "ratio": ours / theirs, "target": target}

    big = step_times(1, 1024, frequency=2, cycles=repeats)
    small = step_times(12, 256, frequency=10, cycles=repeats)
    product = product_times(1024, repeats)
    chosen = matmul_dtype(torch.bfloat16, torch.device("cpu"))
    return [
        row("1 × 1024², update, against naive", big["rootfree"]["update"], big["naive"]["update"], 1.05),
        row("1 × 1024², other step, against naive", big["rootfree"]["other"], big["naive"]["other"], 0.6),
        row(
            "12 × 256², mean step at T=10, against naive",
            small["rootfree"]["mean"],
            small["naive"]["mean"],
            0.7,
        ),
        row(
            f"product 1024², BF16 against FP32 (chosen: {str(chosen).removeprefix('torch.')})",
            product["torch.bfloat16"],
            product["torch.float32"],
            None,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15, help="cycles that are measured")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settle_allocator()
    rows = measure(args.repeats)
    report(rows)
    if args.json:
        record = {**provenance("python -m bench.cpu_step"), "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
