"""Save each run at half time, finish it, and resume it from the checkpoint of this or another version."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import replace

import torch
from diagonal_calls import BF16, FP32
from digests import Results
from torch import nn
from training import FEW_SHAPES, Run, make_optimizer, make_params, train

from rootfree_kernels import GrowingInterval

HALF, END = 3, 6

RUNS = {
    "RFRMSProp, compensated": Run(
        "RFRMSProp", {"rounding": "compensated", "weight_rounding": "compensated", "state_dtype": BF16}, BF16
    ),
    "RFAdaGrad": Run("RFAdaGrad"),
    "IFShampoo, stochastic": Run("IFShampoo", {"seed": 3}, BF16),
    "IFShampoo, packed, compensated": Run(
        "IFShampoo", {"packed_momentum": True, "rounding": "compensated", "weight_rounding": "compensated"}, BF16
    ),
    "IFShampoo, growing interval, named": Run(
        "IFShampoo", {"precondition_frequency": GrowingInterval(4)}, event="named"
    ),
    "IFShampoo, tiles, every third": Run(
        "IFShampoo", {"max_preconditioner_dim": 3, "precondition_frequency": 3, "factor_dtype": FP32}
    ),
    "IFShampoo, two groups, transposed": Run("IFShampoo", event="two groups", layout="transposed"),
}
SLOWLY = ("RFRMSProp, compensated", "IFShampoo, packed, compensated")


def runs(backend: str) -> dict[str, Run]:
    """Return all runs on a backend by name."""
    if backend != "triton":
        return RUNS
    return {name: replace(RUNS[name], shapes=FEW_SHAPES) for name in SLOWLY}


def save(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> str:
    """Save weights and the optimizer's state dict with torch.save; return the file in base64."""
    memory = io.BytesIO()
    weights = [param.detach() for param in params]
    torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, memory)
    return base64.b64encode(memory.getvalue()).decode()


def resume(run: Run, saved: str, entries: dict[str, str]) -> None:
    """Run the second half of a run with a new optimizer that loads a checkpoint."""
    loaded = torch.load(io.BytesIO(base64.b64decode(saved)), weights_only=True)
    params = make_params(run)
    optimizer = make_optimizer(run, params)
    with torch.no_grad():
        for param, weight in zip(params, loaded["weights"], strict=True):
            param.copy_(weight)
    optimizer.load_state_dict(loaded["optimizer"])
    train(run, params, optimizer, range(HALF, END), entries)


def run_all(results: Results, backend: str, others: Mapping[str, str] | None) -> None:
    """Train each run and save it at half time. Then resume it from the checkpoint in `others`, or from its own."""
    for name, run in runs(backend).items():
        with results.case(f"checkpoint, {name}") as entries:
            params = make_params(run)
            optimizer = make_optimizer(run, params)
            train(run, params, optimizer, range(HALF), {})
            results.checkpoints[name] = save(params, optimizer)
            train(run, params, optimizer, range(HALF, END), entries)
        with results.case(f"resumed checkpoint, {name}") as entries:
            resume(run, (results.checkpoints if others is None else others)[name], entries)
