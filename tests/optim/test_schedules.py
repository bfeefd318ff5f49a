"""Schedules of the update interval."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rootfree_kernels import GrowingGap, GrowingInterval, IFShampoo
from tests.calls import reference as ref
from tests.calls.optimizers import OPTIONS
from tests.optim.runs import set_gradients


@pytest.mark.parametrize("max_interval", [1, 2, 3, 10])
def test_growing_interval_matches_its_documentation(max_interval: int) -> None:
    due = GrowingInterval(max_interval)
    assert [due(t) for t in range(5000)] == [ref.growing_interval_updates(t, max_interval) for t in range(5000)]
    with pytest.raises(ValueError, match="max_interval=0"):
        GrowingInterval(0)


@pytest.mark.parametrize("max_gap", [1, 2, 3, 5, 10])
def test_growing_gap_is_the_rule_of_the_authors(max_gap: int) -> None:
    """They keep the step of the next update. In any order of questions, the answers are the same."""
    updates, following = set(), 0
    for step in range(20000):
        if step == following:
            updates.add(step)
            following = step + min(max(int(math.log(step + 1, 4)), 1), max_gap)
    due = GrowingGap(max_gap)
    assert {step for step in reversed(range(20000)) if due(step)} == updates


@pytest.mark.parametrize("max_gap", [0, -1, 1.5, None], ids=repr)
def test_growing_gap_requires_an_integer(max_gap: Any) -> None:
    with pytest.raises(ValueError, match=r"max_gap=.*pass a whole number"):
        GrowingGap(max_gap)


# ---- callables with a memory -----------------------------------------------------------------------------------------


class EverySecond:
    """A callable that remembers when it is next due, and so must be asked once a step."""

    def __init__(self) -> None:
        self.following = 0
        self.asked: list[int] = []

    def __call__(self, step: int) -> bool:
        self.asked.append(step)
        if step != self.following:
            return False
        self.following = step + 2
        return True


def factors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state["factor_c"].clone() for state in optimizer.state.values()]


def changed_factors(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> list[bool]:
    """Take a step and return for every parameter whether its factors changed."""
    old = factors(optimizer)
    set_gradients(params, step)
    optimizer.step()
    return [not torch.equal(x, y) for x, y in zip(old, factors(optimizer), strict=True)]


def test_a_callable_is_asked_once_in_a_step_even_for_several_groups() -> None:
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    frequency = EverySecond()
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = IFShampoo(groups, **OPTIONS, precondition_frequency=frequency, factor_dtype=torch.float32)
    set_gradients(params, 0)
    optimizer.step()
    changes = [changed_factors(params, optimizer, step) for step in range(1, 7)]
    assert frequency.asked == list(range(7))
    assert changes == [[step % 2 == 0] * 3 for step in range(1, 7)]


def test_a_callable_is_not_asked_again_when_a_step_that_failed_is_repeated() -> None:
    param, frequency = nn.Parameter(torch.ones(4, 3)), EverySecond()
    optimizer = IFShampoo([param], **OPTIONS, precondition_frequency=frequency)
    for step in range(3):
        param.grad = torch.ones_like(param).to_sparse()
        with pytest.raises(RuntimeError, match="dense"):
            optimizer.step()
        if step:  # it fails after the callable was asked
            param.grad = torch.ones_like(param)
            optimizer.param_groups.append({**optimizer.param_groups[0], "params": [], "lr": -1.0})
            with pytest.raises(ValueError, match="lr"):
                optimizer.step()
            optimizer.param_groups.pop()
        set_gradients([param], step)
        optimizer.step()
    assert frequency.asked == [0, 1, 2]


def test_a_callable_is_not_asked_about_parameters_without_a_gradient() -> None:
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    frequency = EverySecond()
    optimizer = IFShampoo(params, **OPTIONS, precondition_frequency=frequency)
    set_gradients(params, 0)
    optimizer.step()
    params[1].grad = None
    for step in range(1, 4):
        set_gradients(params[:1], step)
        optimizer.step()
    assert frequency.asked == [0, 1, 2, 3]
