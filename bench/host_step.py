"""What a step costs the host: Python and the dispatcher, with operators that do nothing.

    python -m bench.host_step [--repeats N] [--profile] [--json FILE]

The parameters are those of GPT-2 124M in number and kind (50 matrices, 98 vectors), with sides divided by 16 so that
they fit anywhere. The backend is a stand-in for Triton whose functions return at once. AdamW, `foreach` and `fused`, on
the same parameters is the yardstick; its share includes the arithmetic of 148 small tensors, which a CPU does at once.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpt2 import GPT2
from bench.record import provenance
from rootfree_kernels import IFShampoo, RFRMSProp, backends

SCALE = 16
COMMON = {"lr": 1e-3, "batch_size": 16}
MODEL = GPT2(width=768 // SCALE, vocabulary=50257 // SCALE, context=1024 // SCALE)
BLOCKS = {"max_preconditioner_dim": 1024 // SCALE}


def idle_backend() -> Any:
    """A backend whose operators do nothing but hand out memory that was there before."""
    outputs: dict[Any, Any] = {}

    def kron_gather(grads: list[Tensor], tiles: list[int], rows: int, cols: int, *rest: Any) -> tuple[Tensor, Tensor]:
        blocks = sum(down * across for down, across in zip(tiles[1::4], tiles[3::4], strict=True))
        if (blocks, rows, cols) not in outputs:
            outputs[blocks, rows, cols] = (
                torch.zeros(blocks, rows, cols, dtype=torch.bfloat16),
                torch.zeros(3, blocks, 1),
            )
        G, squares = outputs[blocks, rows, cols]
        return G.detach(), squares.detach()  # an operator's results are new tensors

    def kron_factor(factor_c: Tensor, *rest: Any) -> Tensor:
        if len(factor_c) not in outputs:
            outputs[len(factor_c)] = torch.ones(len(factor_c), dtype=torch.bool)
        return outputs[len(factor_c)].detach()

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


def make(cls: Any, **options: Any) -> torch.optim.Optimizer:
    params = [nn.Parameter(torch.zeros(shape)) for shape in MODEL.shapes().values()]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer: torch.optim.Optimizer = cls(params, **options)
    return optimizer


def contestants() -> dict[str, torch.optim.Optimizer]:
    return {
        "IFShampoo, T = 1": make(IFShampoo, **COMMON, **BLOCKS),
        "IFShampoo, T = 1, capturable, lr Tensor": make(
            IFShampoo, **{**COMMON, "lr": torch.tensor(1e-3)}, **BLOCKS, capturable=True
        ),
        "IFShampoo, T = 10, other step": make(
            IFShampoo, **COMMON, **BLOCKS, precondition_frequency=lambda step: step == 0
        ),
        "RFRMSProp": make(RFRMSProp, **COMMON),
        "RFRMSProp, BF16 state": make(RFRMSProp, **COMMON, state_dtype=torch.bfloat16),
        "AdamW, foreach": make(torch.optim.AdamW, lr=1e-3, foreach=True),
        "AdamW, fused": make(torch.optim.AdamW, lr=1e-3, fused=True),
    }


def microseconds(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e6


def measure(repeats: int, calls: int = 20) -> dict[str, dict[str, float]]:
    """Median and least microseconds of a step of every contestant, taking turns."""
    optimizers = contestants()
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for optimizer in optimizers.values():
        microseconds(optimizer.step, 3)  # state and plans are made
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            optimizer.step()  # brings its objects back into the caches
            times[name].append(microseconds(optimizer.step, calls))
    return {name: {"median": statistics.median(values), "least": min(values)} for name, values in times.items()}


def profile(calls: int = 200) -> None:
    """Where the time of the first contestant goes."""
    optimizer = next(iter(contestants().values()))
    microseconds(optimizer.step, 3)
    with cProfile.Profile() as profiler:
        microseconds(optimizer.step, calls)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=50, help="rounds of 20 steps each")
    parser.add_argument("--profile", action="store_true", help="say where the time of IFShampoo at T = 1 goes")
    parser.add_argument("--json", type=Path, help="write the times to this file as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(TRITON_INTERPRET="1", ROOTFREE_BACKEND="triton")  # or Triton does not serve a CPU
    backends.BACKENDS["triton"] = idle_backend()
    if args.profile:
        profile()
        return
    rows = measure(args.repeats)
    print(f"{'host time of a step':44} {'median µs':>10} {'least µs':>10}")
    for name, row in rows.items():
        print(f"{name:44} {row['median']:10.0f} {row['least']:10.0f}")
    if args.json:
        record = {**provenance("python -m bench.host_step"), "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
