"""Changes to the state take effect: replaced tensors, deleted state, and changes in hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.calls.optimizers import Case, snapshot, train
from tests.calls.tensors import assert_same_bits, same_bits
from tests.optim.checkpoints import FIRST, SECOND, newcomer, uninterrupted


def replace(state: dict[str, Any], name: str, value: torch.Tensor) -> None:
    state[name] = value


def write(state: dict[str, Any], name: str, value: torch.Tensor) -> None:
    state[name].copy_(value)


@pytest.mark.parametrize("put", [replace, write])
@pytest.mark.parametrize("steps_before", [3, 4], ids=["update-next", "no-update-next"])
def test_a_state_tensor_replaced_or_changed_by_the_user_takes_effect(case: Case, put: Any, steps_before: int) -> None:
    """Replace a state tensor, or write to it. The run continues as if the values had been loaded."""
    model, optimizer = case.start()
    train(model, optimizer, range(steps_before))
    name = "factor_c" if case.is_shampoo else "square"
    value = optimizer.state[model.weight][name] * 2

    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    saved[1]["state"][0][name] = value.clone()
    loaded_model, loaded = case.start()
    loaded_model.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])

    put(optimizer.state[model.weight], name, value.clone())
    steps = range(steps_before, steps_before + 4)
    train(model, optimizer, steps)
    train(loaded_model, loaded, steps)
    assert_same_bits(snapshot(optimizer), snapshot(loaded))


def test_deleted_state_is_created_again(case: Case) -> None:
    """`optimizer.state.clear()` and `del optimizer.state[p]` are ways to reset an optimizer."""
    model, optimizer = case.start()
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, FIRST)
    optimizer.state.clear()
    model.load_state_dict(start)
    train(model, optimizer, [*FIRST, *SECOND])
    assert_same_bits(snapshot(optimizer), uninterrupted(case))


# ---- hooks -----------------------------------------------------------------------------------------------------------


def test_state_dict_hooks_see_and_may_change_what_is_saved(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append(opt))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": "kept"})
    assert optimizer.state_dict()["note"] == "kept"
    assert seen == [optimizer]


def test_a_load_pre_hook_sees_and_may_change_what_is_loaded(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved = optimizer.state_dict()
    halved = saved["state"][0]["momentum_buffer"] / 2

    def halve(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {**state_dict["state"], 0: {**state_dict["state"][0], "momentum_buffer": halved}}
        return {**state_dict, "state": state}

    model, loaded = newcomer(case)
    loaded.register_load_state_dict_pre_hook(halve)
    loaded.load_state_dict(saved)
    assert same_bits(loaded.state[model.weight]["momentum_buffer"], halved)


def test_a_load_post_hook_sees_the_loaded_state_and_may_change_it(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved, at_save = optimizer.state_dict(), snapshot(optimizer)
    model, loaded = newcomer(case)
    seen = {}

    def hook(opt: torch.optim.Optimizer) -> None:
        seen.update({name: x for name, x in snapshot(opt).items() if not name.endswith(" weight")})
        opt.state[model.weight]["momentum_buffer"].zero_()
        opt.state[model.bias]["square"] = torch.full_like(opt.state[model.bias]["square"], 2.0)

    loaded.register_load_state_dict_post_hook(hook)
    loaded.load_state_dict(saved)
    assert_same_bits(seen, {name: x for name, x in at_save.items() if not name.endswith(" weight")})
    assert not loaded.state[model.weight]["momentum_buffer"].any()
    assert (loaded.state[model.bias]["square"] == 2).all()
