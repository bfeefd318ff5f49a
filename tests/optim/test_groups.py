"""Parameters and groups behave as in PyTorch's optimizers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.calls.optimizers import OPTIONS, SHAPES, Case, Model, gradients, params_only, snapshot, train
from tests.calls.tensors import assert_same_bits, same_bits
from tests.optim.runs import AFTER, BEFORE, results, set_gradients, trained


def test_named_parameters_step_as_unnamed_ones_and_keep_their_names(case: Case) -> None:
    model = Model(case.dtype)
    optimizer = case.make(model.named_parameters())
    train(model, optimizer, BEFORE)
    assert_same_bits(snapshot(optimizer), results(case))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(SHAPES)


GROUP_OPTIONS = {
    "lr": 0.02,
    "batch_size": 8,
    "beta2": 0.3,
    "momentum": 0.5,
    "damping": 0.5,
    "weight_decay": 0.0,
    "decoupled_weight_decay": True,
    "maximize": True,
}


@pytest.mark.parametrize("option", GROUP_OPTIONS)
def test_every_group_has_its_own_options(case: Case, option: str) -> None:
    """Each group steps as if all parameters had its options."""
    changed = {option: GROUP_OPTIONS[option]}
    model = Model(case.dtype)
    params = list(model.parameters())
    optimizer = case.make([{"params": params[:1]}, {"params": params[1:], **changed}])
    train(model, optimizer, BEFORE)
    mixed, default, everywhere = snapshot(optimizer), results(case), results(case, **changed)
    assert_same_bits(params_only(mixed, 0), params_only(default, 0))
    assert_same_bits(params_only(mixed, 1, 2, 3, 4), params_only(everywhere, 1, 2, 3, 4))
    makes_none = case.is_recipe and option == "decoupled_weight_decay"  # the recipe's decay is always decoupled
    assert same_bits(mixed["1 weight"], default["1 weight"]) == makes_none


def test_group_options_may_change_between_steps(case: Case) -> None:
    model, optimizer = trained(case)
    optimizer.param_groups[0].update(lr=0.5, batch_size=8)
    train(model, optimizer, AFTER)
    assert not same_bits(snapshot(optimizer)["0 weight"], results(case, [*BEFORE, *AFTER])["0 weight"])

    model, late = case.start(lr=0.5, batch_size=8)
    late.param_groups[0].update({name: OPTIONS[name] for name in ("lr", "batch_size")})
    train(model, late, BEFORE)
    late.param_groups[0].update(lr=0.5, batch_size=8)
    train(model, late, AFTER)
    assert_same_bits(snapshot(late), snapshot(optimizer))


def test_a_group_added_between_steps_does_not_affect_earlier_parameters(case: Case) -> None:
    model = Model(case.dtype)
    params = list(model.parameters())
    optimizer = case.make(params[:3])
    train(model, optimizer, BEFORE)
    optimizer.add_param_group({"params": params[3:]})
    train(model, optimizer, AFTER)

    model = Model(case.dtype)
    alone = case.make(list(model.parameters())[:3])
    train(model, alone, [*BEFORE, *AFTER])
    assert_same_bits(params_only(snapshot(optimizer), 0, 1, 2), snapshot(alone))
    assert [int(optimizer.state[param]["step"]) for param in params] == [6, 6, 6, 3, 3]
    assert optimizer.param_groups[1]["batch_size"] == OPTIONS["batch_size"]


def test_parameters_without_a_gradient_are_skipped(case: Case) -> None:
    """Each parameter steps as if no other parameter had a gradient."""
    shape, pattern = (7, 5), [(0, 1), (0,), (1,), (), (0, 1), (1,)]

    def run(only: set[int]) -> dict[str, Tensor]:
        params = [nn.Parameter(value) for value in gradients([shape, shape, (6,)], -1, case.dtype)]
        optimizer = case.make(params)
        for step, active in enumerate(pattern):
            set_gradients(params, step)
            for index, param in enumerate(params):
                if index not in only.intersection(active):
                    param.grad = None
            optimizer.step()
        return snapshot(optimizer)

    together = run({0, 1})
    assert_same_bits(params_only(together, 0), params_only(run({0}), 0))
    assert_same_bits(params_only(together, 1), params_only(run({1}), 1))
    assert (together["0 step"], together["1 step"]) == (3, 4)
    assert set(params_only(together, 2)) == {"2 weight"}  # no state before the first gradient


def test_a_step_without_any_gradient_changes_nothing(case: Case) -> None:
    model, optimizer = case.start()
    optimizer.step()
    assert not optimizer.state
    train(model, optimizer, BEFORE)
    before = snapshot(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (7, 0), (4, 0, 3, 3)], ids=str)
def test_zero_size_parameters_are_allowed(case: Case, shape: tuple[int, ...]) -> None:
    def run(shapes: list[tuple[int, ...]]) -> torch.optim.Optimizer:
        params = [nn.Parameter(torch.ones(shape, dtype=case.dtype)) for shape in shapes]
        optimizer = case.make(params)
        for step in BEFORE:
            set_gradients(params, step)
            optimizer.step()
        return optimizer

    optimizer = run([(7, 5), (6,), shape])
    assert_same_bits(params_only(snapshot(optimizer), 0, 1), snapshot(run([(7, 5), (6,)])))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def test_a_group_without_parameters_is_allowed(case: Case) -> None:
    model, expected = case.start()
    train(model, expected, [0, 1])
    model = Model(case.dtype)
    optimizer = case.make([{"params": []}, {"params": list(model.parameters())}])
    train(model, optimizer, [0, 1])
    assert_same_bits(snapshot(optimizer), snapshot(expected))


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_steps_identically_and_independently(case: Case, duplicate: Any) -> None:
    model, optimizer = trained(case)
    optimizer.zero_grad()
    other_model, other = duplicate((model, optimizer))
    assert_same_bits(snapshot(other), snapshot(optimizer))
    before = snapshot(optimizer)
    train(other_model, other, AFTER)
    assert_same_bits(snapshot(optimizer), before)
    train(model, optimizer, AFTER)
    assert_same_bits(snapshot(optimizer), snapshot(other))
    assert_same_bits(snapshot(other), results(case, [*BEFORE, *AFTER]))
