"""Optimizers to test, a small model with parameters of every kind, and snapshots of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rootfree_kernels import RECIPE, IFShampoo, RFAdaGrad, RFRMSProp

SHAPES = {"weight": (7, 5), "twin": (7, 5), "conv": (4, 3, 1, 2), "bias": (6,), "scale": ()}
"""Shapes of parameters of every kind. Two of them are equal.

The blocks are small: a product has fewer than 400 multiplications. PyTorch then computes a product in the same way for
every batch size, so results can be compared bitwise.
"""

OPTIONS = {"lr": 0.01, "batch_size": 4, "damping": 0.05, "weight_decay": 0.1}


@dataclass(frozen=True)
class Case:
    """An optimizer with options, and the dtype of the weights that it steps."""

    name: str
    optimizer: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def is_shampoo(self) -> bool:
        return self.optimizer is IFShampoo

    @property
    def is_recipe(self) -> bool:
        return self.options.get("momentum_on") == "gradient"

    def make(self, params: Any, **changes: Any) -> torch.optim.Optimizer:
        return self.optimizer(params, **{**OPTIONS, **self.options, **changes})

    def start(self, **changes: Any) -> tuple[Model, torch.optim.Optimizer]:
        """Return a new model and its optimizer."""
        model = Model(self.dtype)
        return model, self.make(model.parameters(), **changes)


CASES = [
    Case("RFRMSProp", RFRMSProp),
    Case("RFAdaGrad", RFAdaGrad),
    Case("IFShampoo", IFShampoo),
    Case(
        "IFShampoo-T3-tiles",  # 7 × 5 is split into blocks of 3 × 3, 3 × 2, 2 × 3 and 2 × 2, the last two twice
        IFShampoo,
        {"precondition_frequency": 3, "max_preconditioner_dim": 3, "factor_dtype": torch.float32},
    ),
    Case(
        "IFShampoo-compensated-bf16",
        IFShampoo,
        {"rounding": "compensated", "weight_rounding": "compensated"},
        torch.bfloat16,
    ),
    Case("IFShampoo-recipe", IFShampoo, dict(RECIPE)),
]


def gradients(shapes: Iterable[tuple[int, ...]], step: int, dtype: torch.dtype) -> list[Tensor]:
    """Return random gradients. Only the step determines the random values."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


class Model(nn.Module):
    """Model with parameters of every kind. The gradients of its loss at a step equal `gradients` of that step."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = -1) -> None:
        super().__init__()
        for name, value in zip(SHAPES, gradients(SHAPES.values(), seed, dtype), strict=True):
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, step: int) -> Tensor:
        params = list(self.parameters())
        grads = gradients(SHAPES.values(), step, params[0].dtype)
        return torch.stack([(p * g).sum().float() for p, g in zip(params, grads, strict=True)]).sum()


def train(model: Model, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(step).backward()
        optimizer.step()


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of all weights and their state tensors, by readable names."""
    copies = {}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        copies[f"{index} weight"] = param.detach().clone()
        for name, value in optimizer.state.get(param, {}).items():
            copies[f"{index} {name}"] = value.clone()
    return copies


def params_only(shot: Mapping[str, Tensor], *indices: int) -> dict[str, Tensor]:
    """Return the entries of a snapshot that belong to these parameters."""
    return {name: value for name, value in shot.items() if int(name.split()[0]) in indices}
