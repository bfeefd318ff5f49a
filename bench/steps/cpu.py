"""Steps on a CPU against PyTorch's own optimizers, a straightforward implementation, and the authors' sirfshampoo.

    python -m bench.steps.cpu [--repeats N] [--only diagonal|factors|recipe] [--json FILE]

Whatever is compared takes turns step by step in one process, and medians are compared: ours over theirs, so that below
1 is faster. The diagonal step runs on two threads, the factors on one. sirfshampoo takes part where it is installed, or
where a checkout of it lies in .peers/sirfshampoo. On processors where FP32 products go to oneDNN, the rows of the
factors are measured a second time with ROOTFREE_ONEDNN=0, which leaves all products to the BLAS that PyTorch uses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from bench.common.paths import ROOT
from bench.common.record import provenance
from bench.demo.methods import use_fp32_muon
from bench.steps.naive import NaiveIFShampoo
from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from rootfree_kernels.eager import cpu_matmul_dtype
from rootfree_kernels.ops.backends import choose

COMMON = {
    "lr": 1e-3,
    "batch_size": 16,
    "beta2": 0.2,
    "momentum": 0.9,
    "riemannian_momentum": 0.5,
    "damping": 1e-4,
}
PEERS = ROOT / ".peers"
LARGE = 20_000_000
BYTES = 28
"""A number of FP32 in the diagonal step with momentum: weight, gradient, s and m read, all but the gradient written."""

Row = dict[str, Any]


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def taking_turns(calls: Mapping[str, Callable[[], Any]], repeats: int, warmups: int = 2) -> dict[str, list[float]]:
    """Seconds of every repeat of each call. The order is turned round every time: a call that comes after another one
    finds its data in the caches, and has its writes to wait for."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(warmups + repeats):
        for name in list(calls)[:: 1 if repeat % 2 else -1]:
            taken = seconds(calls[name])
            if repeat >= warmups:
                times[name].append(taken)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(every) for name, every in times.items()}


def row(case: str, ours: float, theirs: float, target: float | None = None) -> Row:
    return {"case": case, "ours": ours, "theirs": theirs, "ratio": ours / theirs, "target": target}


def parameters(num: int, *shape: int) -> list[torch.nn.Parameter]:
    """`num` weights with fixed random gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(num)]
    for param in params:
        param.grad = torch.randn(shape, generator=generator) * 0.1
    return params


# ---- the diagonal step -------------------------------------------------------------------------------------------


def diagonal_optimizers(num: int, size: int) -> dict[str, Optimizer]:
    def ours(**options: Any) -> Optimizer:
        return RFRMSProp(parameters(num, size), lr=1e-4, batch_size=16, **options)

    return {
        "FP32": ours(),
        "AdamW": torch.optim.AdamW(parameters(num, size), lr=1e-4, fused=True),
        "RMSprop": torch.optim.RMSprop(parameters(num, size), lr=1e-4, foreach=True, momentum=0.9),
        "BF16 state": ours(state_dtype=torch.bfloat16),
        "BF16 state, compensated": ours(state_dtype=torch.bfloat16, rounding="compensated"),
        "eager": ours(fused=False),
    }


def diagonal_rows(repeats: int) -> list[Row]:
    large = {name: opt.step for name, opt in diagonal_optimizers(1, LARGE).items()}
    copy = partial(torch.empty(LARGE).copy_, torch.randn(LARGE))
    slow = {name: large.pop(name) for name in ("RMSprop", "eager")}
    time_of = medians(taking_turns({**large, "copy": copy}, 3 * repeats))
    time_of |= medians(taking_turns(slow, repeats))
    name = "RFRMSProp, 20M FP32 numbers"
    rows = [
        row(f"{name}: fused AdamW", time_of["FP32"], time_of["AdamW"], 1.0),
        row(f"{name}: foreach RMSprop with momentum", time_of["FP32"], time_of["RMSprop"], 1 / 2.8),
        row(
            f"{name}: {BYTES} bytes a number at the rate of a copy", time_of["FP32"], time_of["copy"] * BYTES / 8, 1.25
        ),
        row("the same with BF16 state: FP32 state", time_of["BF16 state"], time_of["FP32"], 1.0),
        row("BF16 state, compensated: FP32 state", time_of["BF16 state, compensated"], time_of["FP32"], 1.0),
        row(f"{name}: eager backend", time_of["FP32"], time_of["eager"]),
    ]
    del large, slow, copy
    small = {name: opt.step for name, opt in diagonal_optimizers(1000, 1000).items()}
    time_of = medians(taking_turns(small, 3 * repeats))
    name = "RFRMSProp, 1,000 tensors of 1,000"
    return [
        *rows,
        row(f"{name}: foreach RMSprop with momentum", time_of["FP32"], time_of["RMSprop"], 1 / 3),
        row(f"{name}: fused AdamW", time_of["FP32"], time_of["AdamW"]),
        row(f"{name}, BF16 state: FP32 state", time_of["BF16 state"], time_of["FP32"], 1.0),
    ]


# ---- the factors -------------------------------------------------------------------------------------------------


def find_sirfshampoo() -> Any:
    """The authors' package, None where it is not there."""
    if (PEERS / "sirfshampoo").is_dir():
        sys.path.insert(0, str(PEERS / "sirfshampoo"))
    try:
        return import_module("sirfshampoo")
    except ImportError:
        return None


def make_sirfshampoo(package: Any, num: int, size: int, frequency: int) -> Optimizer:
    model = torch.nn.ParameterList(parameters(num, size, size))
    options = {"lr": COMMON["lr"], "beta2": COMMON["beta2"], "alpha1": COMMON["momentum"], "lam": COMMON["damping"]}
    options |= {"alpha2": COMMON["riemannian_momentum"], "batch_size": COMMON["batch_size"], "T": frequency}
    optimizer: Optimizer = package.SIRFShampoo(model, **options)
    return optimizer


def step_times(num: int, size: int, frequency: int, cycles: int) -> dict[str, dict[str, float]]:
    """Median seconds of an update, of another step and of a mean step of `frequency`, of all, taking turns."""

    def make(cls: Callable[..., Optimizer], **options: Any) -> Optimizer:
        return cls(parameters(num, size, size), **COMMON, precondition_frequency=frequency, **options)

    contestants = {
        "naive": make(NaiveIFShampoo),
        "ours": make(IFShampoo, factor_dtype=torch.float32),
        "BF16": make(IFShampoo, factor_dtype=torch.bfloat16),
        "eager": make(IFShampoo, factor_dtype=torch.float32, fused=False),
    }
    if package := find_sirfshampoo():
        contestants["sirfshampoo"] = make_sirfshampoo(package, num, size, frequency)
    steps = {name: opt.step for name, opt in contestants.items()}
    every = taking_turns(steps, cycles * frequency, warmups=frequency)
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
    """The step of the recipe against the same step in the root-free direction by the paper's rule, and against Muon."""
    use_fp32_muon()
    root_free = {**COMMON, "clip": "row_sum"}
    contestants: dict[str, Optimizer] = {
        "recipe": IFShampoo(parameters(1, 1024, 1024), **RECIPE, factor_dtype=torch.float32),
        "paper": IFShampoo(parameters(1, 1024, 1024), **root_free, factor_dtype=torch.float32),
        "Muon": torch.optim.Muon(parameters(1, 1024, 1024)),
    }
    time_of = medians(taking_turns({name: opt.step for name, opt in contestants.items()}, repeats))
    case = "Recipe (whitened), FP32, 1024², T=1"
    return [
        row(f"{case}: the paper's rule (root-free)", time_of["recipe"], time_of["paper"], 0.85),
        row(f"{case}: Muon of PyTorch, Newton–Schulz in FP32", time_of["recipe"], time_of["Muon"], 1.0),
    ]


def blas_rows(repeats: int) -> list[Row]:
    """The rows of the factors without oneDNN, from a process of its own: the choice is made once in each."""
    command = [sys.executable, "-m", "bench.steps.cpu", "--repeats", str(repeats), "--only", "blas"]
    environment = {**os.environ, "ROOTFREE_ONEDNN": "0"}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows: list[Row] = json.loads(printed.splitlines()[-1])
    return rows


def product_row(size: int, repeats: int) -> Row:
    """BF16 against FP32 products of PyTorch, which is what `rootfree_kernels.eager.cpu_matmul_dtype` decides by."""
    bf16, fp32 = (torch.randn(1, size, size, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    calls = {"bf16": lambda: torch.bmm(bf16, bf16), "fp32": lambda: torch.bmm(fp32, fp32)}
    times = medians(taking_turns(calls, repeats))
    chosen = str(cpu_matmul_dtype(torch.bfloat16, torch.device("cpu"))).removeprefix("torch.")
    return row(f"torch.bmm, {size}², BF16 (chosen: {chosen}): FP32", times["bf16"], times["fp32"])


# ---- command line ------------------------------------------------------------------------------------------------


def settle_allocator() -> None:
    """Let the C library see a large tensor come and go, as in any training: it then keeps memory of this size, instead
    of giving it back to the system after every step, which would time page faults."""
    torch.zeros(7 << 20)


def report(rows: list[Row]) -> None:
    print(f"{'ours: theirs':70} {'ours ms':>9} {'theirs ms':>9} {'ratio':>6}  target")
    for each in rows:
        target = f"≤ {each['target']:.3g}" if each["target"] else ""
        print(f"{each['case']:70} {each['ours'] * 1e3:9.2f} {each['theirs'] * 1e3:9.2f} {each['ratio']:6.2f}  {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
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
    report(rows)
    if args.json:
        record = {**record, "backend": choose(torch.device("cpu"), torch.float32).name, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
