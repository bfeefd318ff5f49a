"""State dicts that do not match the optimizer raise before anything changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rootfree_kernels import IFShampoo, RFRMSProp
from tests.calls.optimizers import OPTIONS, SHAPES, Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits


def other_classes(case: Case) -> dict[str, torch.optim.Optimizer]:
    """Return optimizers of a `Model` whose state differs from the state of the case's optimizer."""
    own = RFRMSProp if case.is_shampoo else IFShampoo
    common = {"lr": OPTIONS["lr"]}
    return {
        "ours": own(Model(case.dtype).parameters(), **OPTIONS),
        "AdamW": torch.optim.AdamW(Model(case.dtype).parameters(), **common),
        "SGD": torch.optim.SGD(Model(case.dtype).parameters(), **common),
    }


def assert_refused(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], match: str) -> None:
    """Check that loading raises ValueError and changes neither options nor weights nor state."""
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state_dict)
    assert_same_bits(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("stepped", [True, False], ids=["stepped", "new"])
@pytest.mark.parametrize("other", ["ours", "AdamW", "SGD"])
def test_a_state_dict_of_another_class_is_refused(case: Case, other: str, stepped: bool) -> None:
    model, optimizer = case.start()
    train(model, optimizer, [0, 1])
    stranger = other_classes(case)[other]
    if stepped:
        for param in stranger.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        stranger.step()
    assert_refused(optimizer, stranger.state_dict(), match=type(optimizer).__name__)


@pytest.mark.parametrize("target", SHAPES)
def test_a_state_dict_of_other_shapes_is_refused(case: Case, target: str) -> None:
    model, optimizer = case.start()
    train(model, optimizer, [0, 1])
    params = [
        nn.Parameter(torch.ones((2, *shape) if name == target else shape, dtype=case.dtype))
        for name, shape in SHAPES.items()
    ]
    stranger = case.make(params)
    for param in params:
        param.grad = torch.ones_like(param)
    stranger.step()
    assert_refused(optimizer, stranger.state_dict(), match=r"state_dict has .* load one")


def test_a_state_dict_of_other_groups_is_refused(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, [0, 1])
    params = list(Model(case.dtype).parameters())
    split = case.make([{"params": params[:2]}, {"params": params[2:]}])
    assert_refused(optimizer, split.state_dict(), match="groups")
    assert_refused(optimizer, case.make(params[1:]).state_dict(), match="groups")


@pytest.mark.parametrize("entry", ["step", "momentum_buffer", "skipped"])
def test_a_state_dict_that_lacks_an_entry_or_has_one_too_many_is_refused(case: Case, entry: str) -> None:
    model, optimizer = case.start()
    train(model, optimizer, [0, 1])
    index = list(SHAPES).index("bias")
    for change in (lambda state: state.pop(entry), lambda state: state.update(exp_avg=torch.ones(6))):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved["state"][index])
        assert_refused(optimizer, saved, match=r"state_dict has .* load one")


def test_a_state_dict_of_a_model_is_refused(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, range(1))
    assert_refused(optimizer, model.state_dict(), match="not of a model")


@pytest.mark.parametrize("value", [None, [1.0], 3.0, "text"], ids=repr)
@pytest.mark.parametrize("entry", ["step", "momentum_buffer"])
def test_a_state_dict_with_something_else_than_tensors_is_refused(case: Case, entry: str, value: Any) -> None:
    model, optimizer = case.start()
    train(model, optimizer, [0, 1])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][entry] = [torch.ones(3)] if entry == "step" and value == 3.0 else value
    assert_refused(optimizer, saved, match=f"as {entry}: load one")


def test_a_state_dict_with_several_step_counts_of_a_parameter_is_refused(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, [0, 1])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.ones(3)
    assert_refused(optimizer, saved, match=r"step \(3,\) for \(\)")
