"""What several test files share: the optimizers under test, a small model, and comparison bit for bit."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported: they run on the CPU, slowly

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor, nn

from rootfree_kernels import IFShampoo, RFAdaGrad, RFRMSProp

SHAPES = {"weight": (7, 5), "twin": (7, 5), "conv": (4, 3, 1, 2), "bias": (6,), "scale": ()}
"""One of every kind, two of one shape. The blocks are so small (fewer than 400 multiplications a product) that PyTorch
multiplies them alike however many share a batch, so that results may be compared bit for bit."""

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

    def make(self, params: Any, **changes: Any) -> torch.optim.Optimizer:
        return self.optimizer(params, **{**OPTIONS, **self.options, **changes})

    def start(self, **changes: Any) -> tuple[Model, torch.optim.Optimizer]:
        """A new model and its optimizer."""
        model = Model(self.dtype)
        return model, self.make(model.parameters(), **changes)


CASES = [
    Case("RFRMSProp", RFRMSProp),
    Case("RFAdaGrad", RFAdaGrad),
    Case("IFShampoo", IFShampoo),
    Case(
        "IFShampoo-T3-tiles",  # 7 × 5 falls into blocks of 3 × 3, 3 × 2, 2 × 3 and 2 × 2, the last two shapes twice
        IFShampoo,
        {"precondition_frequency": 3, "max_preconditioner_dim": 3, "factor_dtype": torch.float32},
    ),
    Case(
        "IFShampoo-compensated-bf16",
        IFShampoo,
        {"rounding": "compensated", "weight_rounding": "compensated"},
        torch.bfloat16,
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def gradients(shapes: Iterable[tuple[int, ...]], step: int, dtype: torch.dtype) -> list[Tensor]:
    """Random numbers that depend on the step and on nothing else."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


class Model(nn.Module):
    """Parameters of every kind; the gradients of its loss at a step are `gradients` of that step."""

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
    """Copies of every weight and every tensor of its state, by readable names."""
    copies = {}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        copies[f"{index} weight"] = param.detach().clone()
        for name, value in optimizer.state.get(param, {}).items():
            copies[f"{index} {name}"] = value.clone()
    return copies


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit, signs of zero and NaNs included."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    patterns = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (actual, expected)]
    return torch.equal(*patterns)


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare two snapshots bit for bit."""
    assert sorted(actual) == sorted(expected)
    differ = [name for name in actual if not same_bits(actual[name], expected[name])]
    assert not differ, f"these differ: {differ}"


def params_only(shot: Mapping[str, Tensor], *indices: int) -> dict[str, Tensor]:
    """The entries of some parameters of a snapshot."""
    return {name: value for name, value in shot.items() if int(name.split()[0]) in indices}
