"""Measure what a step costs the host: Python, the dispatcher and launches.

    python -m bench.steps.host [--device cpu|cuda] [--against FOLDER] [--repeats N] [--profile] [--json FILE]

The parameters are those of GPT-2 124M in number and kind (50 matrices, 98 vectors). On a CPU their sides are divided by
16, so that they fit anywhere, and operators do nothing: the backend is a stand-in for Triton whose functions return at
once. On a GPU it is Triton's, and the device's queue is empty before each step. AdamW, `foreach` and `fused`, on the
same parameters is the yardstick; on a CPU its share includes the arithmetic of 148 small tensors.

On the fake GPU, whose launches cost what they cost elsewhere and which computes nothing:

    python tests/fake_gpu --caching python -m bench.steps.host --device cuda

--against FOLDER, a checkout of another commit, measures both in turn, in processes of their own.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.gpt import GPT2
from bench.common.paths import ROOT, link_kernels
from bench.common.record import provenance, write_json
from bench.common.report import table
from bench.common.timing import Timer, host_clock
from rootfree_kernels import IFShampoo, RFRMSProp
from rootfree_kernels.arguments import Factors, Gathered, Tiling
from rootfree_kernels.triton_kernels import TRITON

SCALE = 16
YARDSTICK = "AdamW, fused"
COMMON = {"lr": 1e-3, "batch_size": 16}
SMALL = GPT2(width=768 // SCALE, vocabulary=50257 // SCALE, context=1024 // SCALE)
ROUNDS = 3
"""The number of turns of each checkout when two are compared."""

Times = dict[str, dict[str, float]]
"""The median and the least µs of a step, by optimizer."""


def idle_operators() -> Any:
    """Return operators that do nothing but return memory that was there before."""
    outputs: dict[Any, Any] = {}

    def kron_gather(grads: list[Tensor], tiling: Tiling, *rest: Any) -> Gathered:
        tiles, rows, cols = tiling
        blocks = sum(down * across for down, across in zip(tiles[1::4], tiles[3::4], strict=True))
        if (blocks, rows, cols) not in outputs:
            grad, squares = torch.zeros(blocks, rows, cols, dtype=torch.bfloat16), torch.zeros(3, blocks, 1)
            outputs[blocks, rows, cols] = grad, squares
        grad, squares = outputs[blocks, rows, cols]
        return Gathered(grad.detach(), squares.detach())  # an operator's results are new tensors

    def kron_factor(factors: Factors, *rest: Any) -> Tensor:
        num_blocks = len(factors.factor_c)
        if num_blocks not in outputs:
            outputs[num_blocks] = torch.ones(num_blocks, dtype=torch.bool)
        return outputs[num_blocks].detach()

    def nothing(*args: Any) -> None:
        return None

    return SimpleNamespace(
        rf_rmsprop=nothing,
        kron_gather=kron_gather,
        kron_factor=kron_factor,
        kron_step=nothing,
        kron_products=lambda c, k, dtype: (c.to(dtype).clone(), k.to(dtype).clone()),
        num_partial_sums=lambda rows, cols: 1,
        padded_side=lambda size: size,
    )


def make(cls: Any, device: torch.device, **options: Any) -> torch.optim.Optimizer:
    model = GPT2() if device.type == "cuda" else SMALL
    params = [nn.Parameter(torch.zeros(shape, device=device)) for shape in model.shapes().values()]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer: torch.optim.Optimizer = cls(params, **options)
    return optimizer


def contestants(device: torch.device) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers that are measured. All have state and plans: they have taken some steps."""
    shampoo = COMMON if device.type == "cuda" else {**COMMON, "max_preconditioner_dim": 1024 // SCALE}
    capturable = {"lr": torch.tensor(1e-3, device=device), "capturable": True}
    every = {
        "IFShampoo, T = 1": (IFShampoo, shampoo),
        "IFShampoo, T = 1, capturable, lr Tensor": (IFShampoo, {**shampoo, **capturable}),
        "IFShampoo, T = 10, other step": (IFShampoo, {**shampoo, "precondition_frequency": lambda step: step == 0}),
        "RFRMSProp": (RFRMSProp, COMMON),
        "RFRMSProp, BF16 state": (RFRMSProp, {**COMMON, "state_dtype": torch.bfloat16}),
        "AdamW, foreach": (torch.optim.AdamW, {"lr": 1e-3, "foreach": True}),
        YARDSTICK: (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
    }
    optimizers = {name: make(cls, device, **options) for name, (cls, options) in every.items()}
    for optimizer in optimizers.values():
        for _ in range(3):
            optimizer.step()
    return optimizers


def measure(device: torch.device, repeats: int, calls: int = 20) -> Times:
    """Return the times of every contestant. In each round each one takes `calls` steps, whose mean counts."""
    timer = Timer(host_clock(device), warmups=1, repeats=calls, min_repeats=calls)  # one step to warm the caches
    optimizers = contestants(device)
    means: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            samples = timer.samples({name: [optimizer.step]})[name]
            means[name].append(statistics.fmean(sample.time for sample in samples))
    return {name: {"median": statistics.median(values), "least": min(values)} for name, values in means.items()}


def compare(folders: Sequence[Path], device: torch.device, repeats: int) -> list[Times]:
    """Return the median times of checkouts, which take turns in processes of their own."""
    found: list[list[Times]] = [[] for _ in folders]
    for _ in range(ROUNDS):
        for folder, rounds in zip(folders, found, strict=True):
            options = ["--device", device.type, "--repeats", str(repeats), "--json", "-"]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
            command = [sys.executable, str(script_of(folder)), *options]
            run = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            rounds.append(json.loads(run.stdout.splitlines()[-1]))
    return [
        {name: {key: statistics.median(x[name][key] for x in rounds) for key in rounds[0][name]} for name in rounds[0]}
        for rounds in found
    ]


def script_of(folder: Path) -> Path:
    """Return this script in another checkout, whose operators may have other arguments."""
    names = (folder / "bench" / "steps" / "host.py", folder / "bench" / "host_step.py")  # the second: before 0.2
    return next(name for name in names if name.exists())


def profile(device: torch.device, calls: int = 200) -> None:
    """Print where the time of the first contestant goes."""
    optimizer, clock = next(iter(contestants(device).values())), host_clock(device)
    with cProfile.Profile() as profiler:
        for _ in range(calls):
            clock.synchronize()
            optimizer.step()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def table_of(rows: Times, others: Times | None) -> list[str]:
    """Return the table of times, and of those of another checkout; ratios are to AdamW, fused, of the same checkout."""
    columns = ["host time of a step", "median µs", "least µs", "to AdamW", *(["before", "to AdamW"] if others else [])]

    lines = []
    for name, row in rows.items():
        line = [name, f"{row['median']:.0f}"]
        for times in filter(None, (rows, others)):
            line += [f"{times[name]['least']:.0f}", f"{times[name]['least'] / times[YARDSTICK]['least']:.2f}"]
        lines.append(line)
    return table(columns, lines)


def write_record(args: argparse.Namespace, rows: Times, others: Times | None) -> None:
    """Write the times and their origin, without the names of folders of this machine."""
    command = shlex.join(["python", "-m", "bench.steps.host", *sys.argv[1:]])
    record = {**provenance(command), "fake_gpu": os.environ.get("ROOTFREE_FAKE_GPU") == "1", "rows": rows}
    if others and args.against:
        git = ["git", "-C", str(args.against), "rev-parse", "--short", "HEAD"]
        before = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        record["command"] = command.replace(str(args.against), f"CHECKOUT_OF_{before}")
        record["before"] = {"commit": before, "rows": others}
    write_json(Path(args.json), record)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="a checkout to compare with, e.g. a worktree")
    parser.add_argument("--repeats", type=int, default=50, help="rounds of 20 steps each")
    parser.add_argument("--profile", action="store_true", help="show where the time of IFShampoo at T = 1 goes")
    parser.add_argument("--json", help="write the times to this file as well; -: print nothing else")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    torch.set_num_threads(1)
    if device.type == "cpu":
        os.environ.update(TRITON_INTERPRET="1", ROOTFREE_BACKEND=TRITON.name)  # or Triton does not serve a CPU
        TRITON.__dict__.update(operators=idle_operators(), import_problem=None)
    if args.profile:
        profile(device)
        return
    others = None
    if args.against:
        link_kernels(args.against.resolve())
        rows, others = compare([ROOT, args.against.resolve()], device, args.repeats)
    else:
        rows = measure(device, args.repeats)
    if args.json == "-":
        print(json.dumps(rows))
        return
    print("\n".join(table_of(rows, others)))
    if args.json:
        write_record(args, rows, others)


if __name__ == "__main__":
    main()
