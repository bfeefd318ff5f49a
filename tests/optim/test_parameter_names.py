"""Named parameters in another order get their own state when a state dict is loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from tests.calls.optimizers import SHAPES, Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits
from tests.optim.checkpoints import FIRST, SECOND, through_file
from tests.optim.test_bad_state_dicts import assert_refused

ORDER = tuple(SHAPES)
OTHER_ORDER = ("twin", "scale", "weight", "conv", "bias")


def run(case: Case, names: Sequence[str] = ORDER, prefix: str = "", named: bool = True) -> tuple[Model, Any]:
    """Return a model, and an optimizer of its parameters in the order of the names, without stochastic rounding.

    The seed of a parameter's bits comes from its place in the optimizer.
    """
    model = Model(case.dtype)
    own = dict(model.named_parameters())
    params = [(prefix + name, own[name]) if named else own[name] for name in names]
    rounding = {} if "rounding" in case.options else {"rounding": "nearest"}
    return model, case.make(params, **rounding)


def resumed(case: Case, saved_from: Any, loaded_into: Any) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Save after some steps, load into the other optimizer and go on.

    Return the state of both by the names of the parameters, and warnings.
    """
    model, optimizer = saved_from
    train(model, optimizer, FIRST)
    saved = through_file(optimizer.state_dict())
    other_model, other = loaded_into
    other_model.load_state_dict(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_state_dict(saved)
    train(model, optimizer, SECOND)
    train(other_model, other, SECOND)
    return by_name(model, optimizer), by_name(other_model, other), [str(each.message) for each in caught]


def by_name(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {name: param.detach() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        tensors.update({f"{name} {key}": value for key, value in optimizer.state[param].items()})
    return tensors


def test_parameters_in_another_order_get_their_own_state(case: Case) -> None:
    expected, actual, warned = resumed(case, run(case), run(case, OTHER_ORDER))
    assert_same_bits(actual, expected)
    assert not warned


def test_names_stay_in_the_order_of_the_parameters(case: Case) -> None:
    _, optimizer = run(case, OTHER_ORDER)
    optimizer.load_state_dict(run(case)[1].state_dict())
    assert optimizer.param_groups[0]["param_names"] == list(OTHER_ORDER)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["params"] == list(range(5))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("names", [ORDER, OTHER_ORDER], ids=["same order", "other order"])
def test_what_wrappers_add_to_names_does_not_matter(case: Case, prefix: str, names: Sequence[str]) -> None:
    expected, actual, warned = resumed(case, run(case, prefix=prefix), run(case, names))
    assert_same_bits(actual, expected)
    assert not warned


def test_a_wrapper_in_the_middle_of_a_name_does_not_matter(case: Case) -> None:
    expected, actual, warned = resumed(case, run(case, prefix="layers.0._orig_mod."), run(case, prefix="layers.0."))
    assert_same_bits(actual, expected)
    assert not warned


def test_other_names_are_matched_by_order_with_one_warning(case: Case) -> None:
    expected, actual, warned = resumed(case, run(case, prefix="old."), run(case, prefix="new."))
    assert_same_bits(actual, expected)
    assert len(warned) == 1 and "other names of parameters" in warned[0] and "new.bias" in warned[0]


@pytest.mark.parametrize("named", [(True, False), (False, True), (False, False)], ids=str)
def test_parameters_without_names_are_matched_by_order(case: Case, named: tuple[bool, bool]) -> None:
    expected, actual, warned = resumed(case, run(case, named=named[0]), run(case, named=named[1]))
    assert_same_bits(actual, expected)
    assert not warned


def test_each_group_has_its_own_order(case: Case) -> None:
    def start(first: Sequence[str], second: Sequence[str]) -> tuple[Model, Any]:
        model = Model(case.dtype)
        own = dict(model.named_parameters())
        groups = [{"params": [(name, own[name]) for name in names]} for names in (first, second)]
        return model, case.make(
            [groups[0], {**groups[1], "momentum": 0.5}], rounding="nearest", weight_rounding="nearest"
        )

    saved_from = start(ORDER[:3], ORDER[3:])
    expected, actual, warned = resumed(case, saved_from, start(("conv", "weight", "twin"), ("scale", "bias")))
    assert_same_bits(actual, expected)
    assert not warned
    train(*(moved := start(("weight", "twin", "bias"), ("conv", "scale"))), FIRST)
    assert_refused(moved[1], saved_from[1].state_dict(), match=r"parameter 'conv' in group 0, .* in group 1")


def test_names_that_are_not_unique_without_their_wrappers_are_matched_whole(case: Case) -> None:
    """A model may have a submodule whose name is `module`."""

    def start(order: Sequence[str]) -> Any:
        model = Model(case.dtype)
        params = {"weight": model.weight, "module.weight": model.twin}
        return model, case.make([(name, params[name]) for name in order], rounding="nearest", weight_rounding="nearest")

    model, optimizer = start(["weight", "module.weight"])
    train(model, optimizer, FIRST)
    other_model, other = start(["module.weight", "weight"])
    other.load_state_dict(optimizer.state_dict())
    for name in ("weight", "twin"):
        state, expected = other.state[getattr(other_model, name)], optimizer.state[getattr(model, name)]
        assert_same_bits(state, expected)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_a_distributed_state_dict_with_names_is_matched_once(case: Case) -> None:
    """PyTorch has then put the parameters into the order of the optimizer, and left the names as they were."""
    model, optimizer = run(case)
    train(model, optimizer, FIRST)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other_model, other = run(case, OTHER_ORDER)
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, saved)
    assert_same_bits(by_name(other_model, other), by_name(model, optimizer))
    assert other.param_groups[0]["param_names"] == list(OTHER_ORDER)


def test_a_state_dict_in_another_order_of_shapes_is_refused_without_names(case: Case) -> None:
    model, optimizer = run(case, named=False)
    train(model, optimizer, FIRST)
    _, other = run(case, OTHER_ORDER, named=False)
    before = snapshot(other)
    assert_refused(other, optimizer.state_dict(), match="load one of")
    assert_same_bits(snapshot(other), before)
