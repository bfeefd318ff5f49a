"""Gradients that are not finite are skipped and counted."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.calls import reference as ref
from tests.calls.optimizers import CASES, Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits

HUGE = 3e38  # finite in FP32 and BF16, but its products overflow
NON_FINITE = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, HUGE], ids=str)
SHAMPOOS = pytest.mark.parametrize("case", CASES[2:], ids=lambda case: case.name)
OF_THE_PAPER = pytest.mark.parametrize("case", CASES[2:-1], ids=lambda case: case.name)
assert CASES[-1].is_recipe
ROW, COL = 6, 4  # the last element of `weight`, parameter 0


def initial_state(case: Case) -> dict[str, Tensor]:
    """Return weights and state before the first step. A step whose gradients are all NaN creates the state."""
    model, optimizer = case.start()
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    return snapshot(optimizer)


def runs_with_and_without(case: Case, steps_before: int, param: str, index: Any, bad: float) -> tuple:
    """Take one more step, with and without a bad element in one gradient.

    Return snapshots before the step, after the bad step and after the clean step, and the model and optimizer of the
    bad step.
    """
    model, optimizer = case.start()
    train(model, optimizer, range(steps_before))
    before = snapshot(optimizer) if steps_before else initial_state(case)
    clean_model, clean = copy.deepcopy((model, optimizer))
    train(clean_model, clean, [steps_before])
    optimizer.zero_grad()
    model(steps_before).backward()
    getattr(model, param).grad[index] = bad
    optimizer.step()
    return before, snapshot(optimizer), snapshot(clean), model, optimizer


def assert_recovers(model: Model, optimizer: torch.optim.Optimizer, steps: range, buffer: Tensor) -> None:
    """Check that later finite gradients give finite values, change `buffer`, and are not counted as skipped."""
    skips = {name: value for name, value in snapshot(optimizer).items() if "skipped" in name}
    old = buffer.clone()
    train(model, optimizer, steps)
    after = snapshot(optimizer)
    assert all(value.isfinite().all() for value in after.values())
    assert_same_bits({name: after[name] for name in skips}, skips)
    assert (buffer != old).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, HUGE], ids=str)
def test_the_first_gradient_may_be_non_finite(case: Case, bad: float) -> None:
    """Weights and state keep their initial values, except for the counts."""
    model, optimizer = case.start()
    start = snapshot(optimizer)
    model(0).backward()
    for param in model.parameters():
        param.grad.fill_(bad)
    optimizer.step()
    after = snapshot(optimizer)
    assert_same_bits({name: after[name] for name in start}, start)
    for name in after.keys() - start.keys():
        value, entry = after[name], name.split()[1].split(".")[0]
        if entry in ("factor_c", "factor_k"):
            assert torch.equal(value, torch.eye(value.shape[-1]).to(value.dtype).expand_as(value)), name
        else:
            ones = ("step", "skipped") if case.is_recipe else ("square", "step", "skipped")
            assert (value == (1 if entry in ones else 0)).all(), name


BLOCK_ENTRIES = ("curvature", "factor_c", "factor_k", "momentum_c", "momentum_k", "residual_c", "residual_k")


def assert_skips_one_block(case: Case, bad: float, steps_before: int) -> None:
    """Check that the block with the bad element does not change, and that all other blocks step as usual."""
    before, actual, clean, model, optimizer = runs_with_and_without(case, steps_before, "weight", (ROW, COL), bad)
    side = case.options.get("max_preconditioner_dim", 7)
    region = ref.block_slices(7, side)[-1], ref.block_slices(5, side)[-1]
    tile = max(name for name in clean if name.startswith("0 factor_c")).removeprefix("0 factor_c")
    expected = {name: value.clone() for name, value in clean.items()}
    for name in ("0 weight", "0 momentum_buffer", "0 weight_residual"):
        if name in expected:
            expected[name][region] = before[name][region]
    for name in (f"0 {entry}{tile}" for entry in BLOCK_ENTRIES):
        if name in expected:
            expected[name][-1] = before[name][-1]
    expected[f"0 skipped{tile}"][-1] += 1

    assert_same_bits(actual, expected)
    assert sum(int(value.sum()) for name, value in actual.items() if "skipped" in name) == 1
    steps = range(steps_before + 1, steps_before + 4)
    assert_recovers(model, optimizer, steps, optimizer.state[model.weight]["momentum_buffer"][region])


@SHAMPOOS
@NON_FINITE
@pytest.mark.parametrize("steps_before", [0, 3, 4], ids=["first-step", "update-step", "other-step"])
def test_a_non_finite_gradient_skips_only_its_block(case: Case, bad: float, steps_before: int) -> None:
    assert_skips_one_block(case, bad, steps_before)


@OF_THE_PAPER
@pytest.mark.parametrize("steps_before", [0, 3], ids=["first-step", "update-step"])
def test_an_overflow_of_the_factors_skips_the_weights_as_well(case: Case, steps_before: int) -> None:
    """The norm of AAᵀ overflows in FP32, but the update of the weights would be finite.

    The recipe is not tested, because the scale of the gradient does not matter there.
    """
    assert_skips_one_block(case, 1e17, steps_before)


@NON_FINITE
@pytest.mark.parametrize("steps_before", [0, 3], ids=["first-step", "later"])
def test_the_diagonal_step_skips_only_elements_that_are_not_finite(case: Case, bad: float, steps_before: int) -> None:
    """The recipe skips the whole tensor, because the norm of an update depends on all elements."""
    skipped = slice(None) if case.is_recipe else 2
    before, actual, clean, model, optimizer = runs_with_and_without(case, steps_before, "bias", 2, bad)
    expected = {name: value.clone() for name, value in clean.items()}
    for name in ("3 weight", "3 square", "3 momentum_buffer", "3 weight_residual"):
        if name in expected:
            expected[name][skipped] = before[name][skipped]
    if case.is_recipe:
        expected["3 curvature"] = before["3 curvature"]
    expected["3 skipped"] += 1
    assert_same_bits(actual, expected)
    steps = range(steps_before + 1, steps_before + 4)
    assert_recovers(model, optimizer, steps, optimizer.state[model.bias]["momentum_buffer"])


def test_finite_gradients_are_never_counted_as_skipped(case: Case) -> None:
    """This includes gradients of zero."""
    model, optimizer = case.start()
    train(model, optimizer, range(6))
    for param in model.parameters():
        param.grad.zero_()
    optimizer.step()
    assert not any(value.any() for name, value in snapshot(optimizer).items() if "skipped" in name)
