"""Write checkpoints with the version of the package that is on `PYTHONPATH` (see `tests/data/README.md`).

    PYTHONPATH=OLD_TREE ROOTFREE_BACKEND=eager python tests/tools/write_checkpoint.py tests/data/checkpoints/0.2.0.pt

The file holds a dictionary of `Checkpoint` fields for each case. Beside it lies a pickle of one whole optimizer. This
module imports nothing from the tests, so that it runs with old versions.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rootfree_kernels

SHAPES = {"weight": (5, 4), "kernel": (2, 3, 1, 2), "bias": (4,), "head": (3, 5)}
BEFORE, AFTER = 3, 4
"""Numbers of steps before and after the checkpoint. The index of a step is the seed of its gradients."""

COMMON = {"lr": 0.02, "batch_size": 4, "damping": 0.05, "weight_decay": 0.1, "momentum": 0.8}
RECIPE = getattr(rootfree_kernels, "RECIPE", None)

CASES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "RFRMSProp": ("RFRMSProp", {"decoupled_weight_decay": True}, torch.float32),
    "RFRMSProp-bf16": ("RFRMSProp", {"state_dtype": torch.bfloat16, "seed": 3}, torch.bfloat16),
    "IFShampoo-fp32-blocks-T2": (
        "IFShampoo",
        {"factor_dtype": torch.float32, "precondition_frequency": 2, "max_preconditioner_dim": 3},
        torch.float32,
    ),
    "IFShampoo-bf16": ("IFShampoo", {"matmul_dtype": torch.float32, "seed": 5}, torch.float32),
    "IFShampoo-packed": (
        "IFShampoo",
        {"packed_momentum": True, "matmul_dtype": torch.float32, "clip": "row_sum"},
        torch.float32,
    ),
    "IFShampoo-recipe": ("IFShampoo", {**(RECIPE or {}), "matmul_dtype": torch.float32}, torch.float32),
}
"""The class of the optimizer, its options beside `COMMON`, and the dtype of the weights."""

PICKLED = "IFShampoo-fp32-blocks-T2"


def written_cases() -> list[str]:
    """Return the cases that this version of the package can run."""
    known = inspect.signature(rootfree_kernels.IFShampoo).parameters
    names = [name for name in CASES if RECIPE or "recipe" not in name]
    return [name for name in names if "packed_momentum" in known or "packed" not in name]


def drawn(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Return values in (-1, 1) from random integers, which are equal on every processor."""
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randint(-(2**20) + 1, 2**20, shape, generator=generator) for shape in SHAPES.values()]
    return [(x.float() / 2**20).to(dtype) for x in whole]


def make_params(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(value) for value in drawn(-1, dtype)]


def make_groups(params: list[Any], name: str) -> list[dict[str, Any]]:
    """Return two groups. The head takes the diagonal step."""
    rest = {"structure": "elementwise"} if name == "IFShampoo" else {"beta2": 0.2}
    return [{"params": params[:3]}, {"params": params[3:], **rest}]


def take_steps(params: Iterable[Tensor], optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    params = list(params)
    for step in steps:
        for param, grad in zip(params, drawn(step, params[0].dtype), strict=True):
            param.grad = grad
        optimizer.step()


def main(path: Path) -> None:
    """Write the checkpoints of all cases, and the weights after some further steps of the code that wrote them."""
    torch.set_num_threads(1)
    written = {}
    for case in written_cases():
        name, options, dtype = CASES[case]
        params = make_params(dtype)
        optimizer = getattr(rootfree_kernels, name)(make_groups(params, name), **{**COMMON, **options})
        take_steps(params, optimizer, range(BEFORE))
        if case == PICKLED:
            torch.save([params, optimizer], path.with_suffix(".pickle"))
        at_save = [param.detach().clone() for param in params]
        saved = {
            "state": {i: {k: x.clone() for k, x in s.items()} for i, s in optimizer.state_dict()["state"].items()},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
        take_steps(params, optimizer, range(BEFORE, BEFORE + AFTER))
        written[case] = {"weights": at_save, "optimizer": saved, "weights_later": [p.detach() for p in params]}
    torch.save(written, path, _use_new_zipfile_serialization=False)  # many small tensors: half the size of a zip file


if __name__ == "__main__":
    main(Path(sys.argv[1]))
