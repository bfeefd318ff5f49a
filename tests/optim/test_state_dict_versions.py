"""State dicts of older and newer versions: options that one side does not know, and the version of the format."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from rootfree_kernels import PAPER_RULE, RECIPE, IFShampoo
from rootfree_kernels.optim.saved_groups import FORMAT_VERSION
from tests.calls.optimizers import OPTIONS, Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits
from tests.optim.checkpoints import FIRST, SECOND, every_fourth, through_file, uninterrupted
from tests.optim.test_bad_state_dicts import assert_refused


def saved_run(case: Case, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state dicts of a model and its optimizer after some steps."""
    model, optimizer = case.start(**changes)
    train(model, optimizer, FIRST)
    return through_file([model.state_dict(), optimizer.state_dict()])


def without(state_dict: dict[str, Any], *options: str) -> dict[str, Any]:
    groups = [{name: x for name, x in group.items() if name not in options} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def with_keys(state_dict: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {**state_dict, "param_groups": [{**group, **keys} for group in state_dict["param_groups"]]}


# ---- options that were not saved -------------------------------------------------------------------------------------


def test_any_option_may_be_missing(case: Case) -> None:
    _, saved = saved_run(case)
    for option in case.start()[1].defaults:
        _, optimizer = case.start()
        optimizer.load_state_dict(without(saved, option))
        assert optimizer.state_dict()["param_groups"] == saved["param_groups"], option


def test_options_that_were_not_saved_keep_the_values_of_the_loading_optimizer(case: Case) -> None:
    """Training goes on as if they had been saved, because both optimizers have the same options."""
    weights, saved = saved_run(case)
    model, optimizer = case.start()
    model.load_state_dict(weights)
    telling = "clip" if case.is_shampoo else "damping"  # tells that it is a state dict of this class
    optimizer.load_state_dict(without(saved, *optimizer.defaults.keys() - {telling}))
    assert optimizer.state_dict()["param_groups"] == saved["param_groups"]
    train(model, optimizer, SECOND)
    assert_same_bits(snapshot(optimizer), uninterrupted(case))


def test_an_option_that_was_not_saved_keeps_the_value_of_its_group() -> None:
    def make(momenta: tuple[float, float]) -> IFShampoo:
        params = list(Model().parameters())
        groups = [{"params": params[:2], "momentum": momenta[0]}, {"params": params[2:], "momentum": momenta[1]}]
        return IFShampoo(groups, **{**OPTIONS, "lr": torch.tensor(0.01), "precondition_frequency": every_fourth})

    saved = make((0.5, 0.6)).state_dict()
    loaded = make((0.7, 0.8))
    before = [dict(group) for group in loaded.param_groups]
    loaded.load_state_dict(without(saved, "momentum", "precondition_frequency", "lr"))
    assert [group["momentum"] for group in loaded.param_groups] == [0.7, 0.8]
    for group, own in zip(loaded.param_groups, before, strict=True):
        assert group["precondition_frequency"] is every_fourth and group["lr"] is own["lr"]


def test_state_from_before_the_recipe_was_made_by_the_rule_of_the_paper() -> None:
    """Such a state dict has none of the options of the recipe, and no version."""
    case = Case("IFShampoo", IFShampoo)
    _, saved = saved_run(case)
    del saved["format_version"]
    loaded = IFShampoo(Model().parameters(), **{**OPTIONS, **RECIPE, "packed_momentum": True})
    loaded.load_state_dict(without(saved, *PAPER_RULE, "packed_momentum"))
    assert {**loaded.param_groups[0], **PAPER_RULE, "packed_momentum": False} == loaded.param_groups[0]


def test_state_with_some_options_of_the_recipe_is_newer_than_the_recipe() -> None:
    case = Case("recipe", IFShampoo, {**RECIPE, "direction": "root_free"})
    _, saved = saved_run(case)
    loaded = IFShampoo(Model().parameters(), **{**OPTIONS, **RECIPE})
    for version in ({}, {"format_version": 1}):
        loaded.load_state_dict({**without(saved, "update_norm"), **version})
        assert loaded.param_groups[0]["update_norm"] == "muon"
        assert loaded.param_groups[0]["direction"] == "root_free"


def test_a_versioned_state_dict_without_the_options_of_the_recipe_takes_those_of_the_optimizer() -> None:
    case = Case("recipe", IFShampoo, dict(RECIPE))
    _, saved = saved_run(case)
    loaded = IFShampoo(Model().parameters(), **{**OPTIONS, **RECIPE})
    loaded.load_state_dict(without(saved, *PAPER_RULE))
    assert loaded.state_dict()["param_groups"] == saved["param_groups"]


def test_a_missing_option_under_which_the_state_looks_different_is_an_error() -> None:
    case = Case("packed", IFShampoo, {"packed_momentum": True})
    _, saved = saved_run(case)
    _, optimizer = Case("IFShampoo", IFShampoo).start()
    assert_refused(optimizer, without(saved, "packed_momentum"), match="packed_momentum=False")


# ---- options that are not known --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, 1])
def test_unknown_keys_of_a_group_are_kept_without_a_warning(case: Case, version: int | None) -> None:
    """Schedulers and training loops add some."""
    _, saved = saved_run(case)
    saved = with_keys(saved, initial_lr=0.3, lr_scale=0.5, layer="head")
    if version is None:
        del saved["format_version"]
    _, optimizer = case.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == saved["param_groups"]


def test_options_of_a_newer_version_are_kept_with_one_warning_that_names_them(case: Case) -> None:
    _, saved = saved_run(case)
    newer = {**with_keys(saved, sharpness=2, annealing="cosine", initial_lr=0.3), "format_version": FORMAT_VERSION + 1}
    model, optimizer = case.start()
    with pytest.warns(UserWarning) as caught:
        optimizer.load_state_dict(newer)
    assert len(caught) == 1
    assert "annealing, sharpness stay" in str(caught[0].message) and "initial_lr" not in str(caught[0].message)
    assert optimizer.param_groups[0]["sharpness"] == 2
    train(model, optimizer, SECOND)
    assert optimizer.state_dict()["format_version"] == FORMAT_VERSION


def test_a_newer_version_without_unknown_options_loads_without_a_warning(case: Case) -> None:
    _, saved = saved_run(case)
    _, optimizer = case.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict({**saved, "format_version": FORMAT_VERSION + 1})


def test_a_version_that_is_no_number_is_refused(case: Case) -> None:
    _, saved = saved_run(case)
    _, optimizer = case.start()
    assert_refused(optimizer, {**saved, "format_version": "1.0"}, match="format_version='1.0'")


def test_a_saved_option_that_cannot_be_served_is_refused(case: Case) -> None:
    _, saved = saved_run(case)
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    assert_refused(optimizer, with_keys(saved, rounding="upwards"), match="rounding='upwards': choose one of")
    assert_refused(optimizer, with_keys(saved, state_dtype="float3"), match="state_dtype='float3'")


# ---- keys that come from PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["loaded", "unpickled", "deepcopied"])
def test_no_key_is_added_to_groups_or_defaults(case: Case, way: str) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    keys = [optimizer.defaults.keys(), *(group.keys() for group in optimizer.param_groups)]
    keys = [sorted(each) for each in keys]
    if way == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer = pickle.loads(pickle.dumps(optimizer)) if way == "unpickled" else copy.deepcopy(optimizer)
    assert [sorted(each) for each in (optimizer.defaults, *optimizer.param_groups)] == keys
    optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(2))})
    assert sorted(optimizer.param_groups[-1]) == keys[1]


def test_a_key_of_a_saved_group_stays(case: Case) -> None:
    """Version 0.2.0 saved `differentiable`, which PyTorch had added to an optimizer that was loaded."""
    _, saved = saved_run(case)
    _, optimizer = case.start()
    optimizer.load_state_dict(with_keys(saved, differentiable=False))
    assert optimizer.param_groups[0]["differentiable"] is False
    assert "differentiable" not in optimizer.defaults


def test_keys_of_a_scheduler_are_loaded(case: Case) -> None:
    model, optimizer = case.start()
    OneCycleLR(optimizer, max_lr=0.05, total_steps=11)
    train(model, optimizer, FIRST)
    _, loaded = case.start()
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    assert loaded.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert {"initial_lr", "max_lr", "min_lr", "max_momentum"} <= loaded.param_groups[0].keys()
