"""Compare steps on a CPU with PyTorch's optimizers, a straightforward implementation, and the authors' sirfshampoo.

    python -m bench.steps.cpu [--repeats N] [--only diagonal|factors|recipe] [--json FILE]

Optimizers take turns step by step in one process. Ratios are of median times, ours over theirs: below 1 is faster. The
diagonal step runs on two threads, the factors on one. sirfshampoo takes part if it is installed, or if there is a
checkout of it in .peers/sirfshampoo. On processors where FP32 products go to oneDNN, the rows of the factors are
measured a second time with ROOTFREE_ONEDNN=0, which leaves all products to the BLAS that PyTorch uses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from bench.common.memory import settle_allocator
from bench.common.muon import use_fp32_muon
from bench.common.optimizers import ENTRIES, LR, SETTINGS, WHOLE
from bench.common.peers import why_missing
from bench.common.record import provenance, write_json
from bench.common.report import table
from bench.common.roofline import diagonal_bytes
from bench.common.timing import HostClock, Timer
from bench.steps.naive import NaiveIFShampoo
from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from rootfree_kernels.eager import cpu_matmul_dtype
from rootfree_kernels.ops.backends import choose

COMMON = {"lr": LR, **SETTINGS}
LARGE = 20_000_000
BYTES = diagonal_bytes(torch.float32, torch.float32, torch.float32)

Row = dict[str, Any]


def seconds(calls: Mapping[str, Callable[[], Any]], repeats: int, warmups: int = 2) -> dict[str, list[float]]:
    """Return the seconds of every repeat of each call; calls take turns."""
    timer = Timer(HostClock(), warmups, repeats, min_repeats=repeats)
    samples = timer.samples({name: [call] for name, call in calls.items()})
    return {name: [sample.time * 1e-6 for sample in every] for name, every in samples.items()}


def median_seconds(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    return {name: statistics.median(every) for name, every in seconds(calls, repeats).items()}


def steps_of(optimizers: Mapping[str, Optimizer]) -> dict[str, Callable[[], Any]]:
    return {name: optimizer.step for name, optimizer in optimizers.items()}


def row(case: str, ours: float, theirs: float, target: float | None = None) -> Row:
    return {"case": case, "ours": ours, "theirs": theirs, "ratio": ours / theirs, "target": target}


def parameters(num: int, *shape: int) -> list[torch.nn.Parameter]:
    """Return `num` weights with fixed random gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(num)]
    for param in params:
        param.grad = torch.randn(shape, generator=generator) * 0.1
    return params


def registered(name: str, params: list[torch.nn.Parameter], period: int = 1) -> Optimizer:
    """Return an optimizer of the registry, without cuts of its weights."""
    return ENTRIES[name].make(params, period, WHOLE)


# ---- the diagonal step -----------------------------------------------------------------------------------------------


def diagonal_optimizers(num: int, size: int) -> dict[str, Optimizer]:
    def ours(**options: Any) -> Optimizer:
        return RFRMSProp(parameters(num, size), lr=LR, batch_size=16, **options)

    return {
        "FP32": ours(),
        "AdamW": registered("AdamW, fused", parameters(num, size)),
        "RMSprop": registered("RMSprop, foreach", parameters(num, size)),
        "BF16 state": ours(state_dtype=torch.bfloat16),
        "BF16 state, compensated": ours(state_dtype=torch.bfloat16, rounding="compensated"),
        "eager": ours(fused=False),
    }


def diagonal_rows(repeats: int) -> list[Row]:
    large = steps_of(diagonal_optimizers(1, LARGE))
    large["copy"] = partial(torch.empty(LARGE).copy_, torch.randn(LARGE))
    slow = {name: large.pop(name) for name in ("RMSprop", "eager")}
    time_of = median_seconds(large, 3 * repeats) | median_seconds(slow, repeats)
    ours, name = time_of["FP32"], "RFRMSProp, 20M FP32 numbers"
    rows = [
        row(f"{name}: fused AdamW", ours, time_of["AdamW"], 1.0),
        row(f"{name}: foreach RMSprop with momentum", ours, time_of["RMSprop"], 1 / 2.8),
        row(f"{name}: {BYTES} bytes a number at the rate of a copy", ours, time_of["copy"] * BYTES / 8, 1.25),
        row("the same with BF16 state: FP32 state", time_of["BF16 state"], ours, 1.0),
        row("BF16 state, compensated: FP32 state", time_of["BF16 state, compensated"], ours, 1.0),
        row(f"{name}: eager backend", ours, time_of["eager"]),
    ]
    del large, slow
    time_of = median_seconds(steps_of(diagonal_optimizers(1000, 1000)), 3 * repeats)
    ours, name = time_of["FP32"], "RFRMSProp, 1,000 tensors of 1,000"
    return [
        *rows,
        row(f"{name}: foreach RMSprop with momentum", ours, time_of["RMSprop"], 1 / 3),
        row(f"{name}: fused AdamW", ours, time_of["AdamW"]),
        row(f"{name}, BF16 state: FP32 state", time_of["BF16 state"], ours, 1.0),
    ]


# ---- the factors -----------------------------------------------------------------------------------------------------


def step_times(num: int, size: int, frequency: int, cycles: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of an update, of another step and of a mean step at T = `frequency`, by optimizer."""

    def make(cls: Callable[..., Optimizer], **options: Any) -> Optimizer:
        return cls(parameters(num, size, size), **COMMON, precondition_frequency=frequency, **options)

    contestants = {
        "naive": make(NaiveIFShampoo),
        "ours": make(IFShampoo, factor_dtype=torch.float32),
        "BF16": make(IFShampoo, factor_dtype=torch.bfloat16),
        "eager": make(IFShampoo, factor_dtype=torch.float32, fused=False),
    }
    if not why_missing("sirfshampoo"):
        contestants["sirfshampoo"] = registered("sirfshampoo", parameters(num, size, size), frequency)
    every = seconds(steps_of(contestants), cycles * frequency, warmups=frequency)
    return {name: summary(times, frequency) for name, times in every.items()}


def summary(times: list[float], frequency: int) -> dict[str, float]:
    cycles = [times[i : i + frequency] for i in range(0, len(times), frequency)]
    return {
        "update": statistics.median(cycle[0] for cycle in cycles),
        "other step": statistics.median(step for cycle in cycles for step in cycle[1:]),
        "mean step": statistics.median(map(statistics.mean, cycles)),
    }


def factor_rows(repeats: int, note: str = "") -> list[Row]:
    rows = []
    big = step_times(1, 1024, frequency=2, cycles=repeats)
    targets = {"update": (0.82, 0.85), "other step": (0.55, 0.5)}
    for kind, (of_naive, of_sirf) in targets.items():
        case, ours = f"IFShampoo{note}, FP32, 1024², {kind}", big["ours"][kind]
        rows.append(row(f"{case}: naive", ours, big["naive"][kind], of_naive))
        if "sirfshampoo" in big:
            rows.append(row(f"{case}: sirfshampoo", ours, big["sirfshampoo"][kind], of_sirf))
        rows.append(row(f"{case}: eager backend", ours, big["eager"][kind]))
        rows.append(row(f"IFShampoo{note}, 1024², {kind}, BF16 factors: FP32", big["BF16"][kind], ours, 1.0))
    small = step_times(12, 256, frequency=10, cycles=repeats)
    case, ours = f"IFShampoo{note}, FP32, 12 × 256², mean step at T=10", small["ours"]["mean step"]
    rows.append(row(f"{case}: naive", ours, small["naive"]["mean step"], 0.7))
    rows.append(row(f"{case}: eager backend", ours, small["eager"]["mean step"]))
    return rows


def recipe_rows(repeats: int) -> list[Row]:
    """Compare the step of the recipe with that of the paper's rule, and with Muon."""
    use_fp32_muon()
    root_free = {**COMMON, "clip": "row_sum"}
    contestants: dict[str, Optimizer] = {
        "recipe": IFShampoo(parameters(1, 1024, 1024), **RECIPE, factor_dtype=torch.float32),
        "paper": IFShampoo(parameters(1, 1024, 1024), **root_free, factor_dtype=torch.float32),
        "Muon": torch.optim.Muon(parameters(1, 1024, 1024)),
    }
    time_of = median_seconds(steps_of(contestants), repeats)
    case = "Recipe (whitened), FP32, 1024², T=1"
    return [
        row(f"{case}: the paper's rule (root-free)", time_of["recipe"], time_of["paper"], 0.85),
        row(f"{case}: Muon of PyTorch, Newton–Schulz in FP32", time_of["recipe"], time_of["Muon"], 1.0),
    ]


def blas_rows(repeats: int) -> list[Row]:
    """Return the rows of the factors without oneDNN, from another process: a process chooses once."""
    command = [sys.executable, "-m", "bench.steps.cpu", "--repeats", str(repeats), "--only", "blas"]
    environment = {**os.environ, "ROOTFREE_ONEDNN": "0"}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows: list[Row] = json.loads(printed.splitlines()[-1])
    return rows


def product_row(size: int, repeats: int) -> Row:
    """Compare PyTorch's BF16 products with FP32 ones; `rootfree_kernels.eager.cpu_matmul_dtype` decides by them."""
    bf16, fp32 = (torch.randn(1, size, size, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    calls = {"bf16": partial(torch.bmm, bf16, bf16), "fp32": partial(torch.bmm, fp32, fp32)}
    times = median_seconds(calls, repeats)
    chosen = str(cpu_matmul_dtype(torch.bfloat16, torch.device("cpu"))).removeprefix("torch.")
    return row(f"torch.bmm, {size}², BF16 (chosen: {chosen}): FP32", times["bf16"], times["fp32"])


# ---- command line ----------------------------------------------------------------------------------------------------


def table_of(rows: list[Row]) -> list[str]:
    columns = ("ours: theirs", "ours ms", "theirs ms", "ratio", "target")
    lines = []
    for each in rows:
        times = [f"{each[name] * 1e3:.2f}" for name in ("ours", "theirs")]
        target = f"≤ {each['target']:.3g}" if each["target"] else ""
        lines.append([each["case"], *times, f"{each['ratio']:.2f}", target])
    return table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="cycles that are measured")
    parser.add_argument("--only", choices=("diagonal", "factors", "recipe", "blas"), help="some of the rows")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    args = parser.parse_args()
    settle_allocator()
    if args.only == "blas":
        torch.set_num_threads(1)
        print(json.dumps(factor_rows(args.repeats, ", BLAS alone")))
        return
    rows: list[Row] = []
    if args.only in (None, "diagonal"):
        torch.set_num_threads(2)
        rows += diagonal_rows(args.repeats)
    record = provenance("python -m bench.steps.cpu")
    torch.set_num_threads(1)
    if args.only in (None, "recipe"):
        rows += recipe_rows(args.repeats)
    if args.only in (None, "factors"):
        rows += [*factor_rows(args.repeats), *blas_rows(args.repeats), product_row(256, args.repeats)]
    print("\n".join(table_of(rows)))
    if args.json:
        backend = choose(torch.device("cpu"), torch.float32).name
        write_json(args.json, {**record, "backend": backend, "rows": rows})


if __name__ == "__main__":
    main()
