"""Descriptions of our optimizers, in the form in which PyTorch describes its own to its tests, and a small problem."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from tests.calls.cpu import needs_cpp

FLAGS = ("foreach", "fused", "maximize", "capturable")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

COMMON_INPUTS = {
    "default": {},
    "lr": {"lr": 0.01},
    "Tensor lr": {"lr": torch.tensor(0.01)},
    "lr of 0": {"lr": 0.0},
    "weight decay": {"weight_decay": 0.1},
    "decoupled weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "capturable": {"weight_decay": 0.1, "capturable": True},
    "capturable, Tensor lr": {"lr": torch.tensor(0.01), "capturable": True},
    "no momentum": {"momentum": 0.0},
    "gamma of 0": {"gamma": 0.0},
}
SHAMPOO_INPUTS = {
    "T = 3": {"precondition_frequency": 3},
    "blocks": {"max_preconditioner_dim": 3},
    "elementwise": {"structure": "elementwise"},
    "recipe": dict(RECIPE),
}


def inputs(options: dict[str, dict[str, Any]]) -> Callable[..., list[OptimizerInput]]:
    return lambda device, dtype=None: [OptimizerInput(None, dict(kwargs), desc) for desc, kwargs in options.items()]


def info(optimizer: type[Optimizer], options: dict[str, dict[str, Any]]) -> OptimizerInfo:
    """Describe an optimizer to the checks."""
    return OptimizerInfo(
        optimizer,
        optim_inputs_func=inputs(options),
        scheduler_inputs=(
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
            [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4), lambda opt: ExponentialLR(opt, gamma=0.9)],
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10), ReduceLROnPlateau],
        ),
        supported_impls=("foreach", "fused"),
        not_og_supported_flags=FLAGS,
        has_capturable_arg=True,
        supports_complex=False,
        supports_fused_on=("cpu", "cuda"),
        optim_error_inputs_func=get_error_inputs_for_all_optims,
    )


INFOS = [info(RFRMSProp, COMMON_INPUTS), info(IFShampoo, {**COMMON_INPUTS, **SHAMPOO_INPUTS})]
CONFIGS = [(each, config) for each in INFOS for config in each.optim_inputs_func("cpu")]
ALL_CONFIGS = [
    (each, config) for each in INFOS for config in _get_optim_inputs_including_global_cliquey_kwargs("cpu", None, each)
]


def named(pair: tuple[OptimizerInfo, OptimizerInput]) -> str:
    flags = ",".join(flag for flag in ("foreach", "fused") if pair[1].kwargs.get(flag))
    return f"{pair[0].name}-{pair[1].desc}{'-' * bool(flags)}{flags}"


each_info = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
each_config = pytest.mark.parametrize("pair", CONFIGS, ids=named)
each_config_and_flag = pytest.mark.parametrize("pair", ALL_CONFIGS, ids=named)
needs_fused = needs_cpp


class Problem:
    """A small least-squares problem with a matrix and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float32, is_named: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        weight, bias, self.x = (
            torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((5, 4), (5,), (3, 4))
        )
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.is_named = is_named

    @property
    def params(self) -> list[Any]:
        both = [self.weight, self.bias]
        return list(zip(("weight", "bias"), both, strict=True)) if self.is_named else both

    def loss(self) -> Tensor:
        self.weight.grad = self.bias.grad = None
        value = (self.x @ self.weight.T + self.bias).square().mean()
        value.backward()
        return value

    def optimizer(self, pair: tuple[OptimizerInfo, OptimizerInput], **changes: Any) -> Optimizer:
        kwargs = copy.deepcopy({**pair[1].kwargs, **changes})
        return pair[0].optim_cls(self.params, **{"batch_size": 4, **kwargs})

    def take_steps(self, optimizer: Optimizer, steps: int) -> None:
        for _ in range(steps):
            self.loss()
            optimizer.step()

    def copy(self, is_named: bool = False) -> Problem:
        other = Problem(self.weight.dtype, is_named)
        other.weight.data.copy_(self.weight.data)
        other.bias.data.copy_(self.bias.data)
        return other

    def assert_equals(self, other: Problem, **tolerance: float) -> None:
        pairs = (self.weight, self.bias), (other.weight, other.bias)
        actual, expected = ([param.detach() for param in params] for params in pairs)
        torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0, "atol": 0}))


def started(pair: Any, steps: int = 3, is_named: bool = False, **changes: Any) -> tuple[Problem, Optimizer]:
    problem = Problem(is_named=is_named)
    optimizer = problem.optimizer(pair, **changes)
    problem.take_steps(optimizer, steps)
    return problem, optimizer


def assert_same_state_dict(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare whole state dicts, including the order and types of their entries."""
    assert list(actual) == list(expected)
    assert actual["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(actual["state"], expected["state"], rtol=0, atol=0)
