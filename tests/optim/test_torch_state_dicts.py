"""State dicts and hooks keep the conventions of `torch.optim` (see `test_torch_conventions.py`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.optim.checkpoints import through_file
from tests.optim.torch_infos import (
    FLAGS,
    Problem,
    assert_same_state_dict,
    each_config,
    each_config_and_flag,
    started,
)

# ---- state and state dicts -------------------------------------------------------------------------------------------


@each_config_and_flag
def test_state_is_there_after_a_step_and_not_before(pair: Any) -> None:
    problem = Problem()
    optimizer = problem.optimizer(pair)
    assert not optimizer.state
    problem.take_steps(optimizer, 1)
    assert optimizer.state.keys() == {problem.weight, problem.bias}
    for state in optimizer.state.values():
        assert state and float(state["step"]) == 1


@each_config_and_flag
@pytest.mark.parametrize("is_named", [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_a_state_dict_goes_through_another_optimizer_unchanged(pair: Any, is_named: tuple[bool, bool]) -> None:
    problem, optimizer = started(pair, is_named=is_named[0])
    saved = copy.deepcopy(optimizer.state_dict())
    untouched = copy.deepcopy(saved)
    other = problem.copy(is_named=is_named[1])
    loaded = other.optimizer(pair)
    loaded.load_state_dict(saved)
    assert_same_state_dict(saved, untouched)
    if is_named[1] and not is_named[0]:
        assert [group.pop("param_names") for group in loaded.param_groups] == [["weight", "bias"]]
    assert_same_state_dict(loaded.state_dict(), saved)
    problem.take_steps(optimizer, 3)
    other.take_steps(loaded, 3)
    other.assert_equals(problem)
    assert loaded.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    torch.testing.assert_close(loaded.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


@each_config_and_flag
def test_a_state_dict_is_equal_after_a_file_read_with_weights_only(pair: Any) -> None:
    _, optimizer = started(pair)
    assert_same_state_dict(through_file(optimizer.state_dict()), optimizer.state_dict())


@each_config_and_flag
def test_equal_runs_have_equal_state_dicts(pair: Any) -> None:
    """Parameters that stand in two groups of a state dict are described alike."""
    _, optimizer = started(pair)
    _, other = started(pair)
    assert_same_state_dict(other.state_dict(), optimizer.state_dict())
    other.param_groups.extend(other.param_groups)
    assert other.state_dict()["param_groups"][-1] == optimizer.state_dict()["param_groups"][-1]


@each_config_and_flag
@pytest.mark.parametrize("flag", [*FLAGS, "differentiable", "all"])
def test_state_dicts_from_before_a_flag_existed_load(pair: Any, flag: str) -> None:
    problem, optimizer = started(pair)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for name in (*FLAGS, "differentiable"):
            if flag in (name, "all"):
                group.pop(name, None)
    optimizer.load_state_dict(old)
    problem.take_steps(optimizer, 1)
    expected, whole = started(pair)
    expected.take_steps(whole, 1)
    problem.assert_equals(expected)


@each_config_and_flag
def test_a_count_of_steps_that_is_no_tensor_loads(pair: Any) -> None:
    problem, optimizer = started(pair)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    problem.take_steps(optimizer, 1)
    expected, whole = started(pair)
    expected.take_steps(whole, 1)
    problem.assert_equals(expected)


@each_config_and_flag
def test_a_deep_copy_has_all_public_attributes_and_steps_alike(pair: Any) -> None:
    problem, optimizer = started(pair)
    other, duplicate = copy.deepcopy((problem, optimizer))

    def public(each: Optimizer) -> set[str]:
        return {name for name in vars(each) if not name.startswith("_")}

    assert public(duplicate) == public(optimizer)
    problem.take_steps(optimizer, 2)
    other.take_steps(duplicate, 2)
    other.assert_equals(problem)


# ---- hooks -----------------------------------------------------------------------------------------------------------


@each_config
def test_hooks_of_a_step_are_called_around_it_in_order(pair: Any) -> None:
    problem, optimizer = started(pair)
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            calls.append(f"{name} at {float(optimizer.state[problem.weight]['step']):g}")

        return hook

    handles: Iterable[Any] = (
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_step_pre_hook(note("pre")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    )
    problem.take_steps(optimizer, 1)
    for handle in handles:
        handle.remove()
    problem.take_steps(optimizer, 1)
    assert calls == ["global pre at 3", "pre at 3", "post at 4", "global post at 4"]


@each_config
def test_a_hook_before_a_step_may_replace_its_closure(pair: Any) -> None:
    problem, optimizer = started(pair)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((args[0], problem.loss), {}))
    assert optimizer.step(lambda: 1 / 0) is not None


@each_config
def test_hooks_of_a_state_dict_see_it_and_may_replace_it(pair: Any) -> None:
    _, optimizer = started(pair)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda optimizer: calls.append("pre"))

    def add(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("post")
        return {**state_dict, "epoch": 3}

    optimizer.register_state_dict_post_hook(add)
    optimizer.register_state_dict_post_hook(lambda optimizer, state_dict: calls.append("first"), prepend=True)
    assert optimizer.state_dict()["epoch"] == 3
    assert calls == ["pre", "first", "post"]


@each_config
@pytest.mark.parametrize("prepend", [False, True], ids=["appended", "prepended"])
def test_hooks_of_a_load_may_replace_the_state_dict_and_change_the_optimizer(pair: Any, prepend: bool) -> None:
    problem, optimizer = started(pair)
    saved = copy.deepcopy(optimizer.state_dict())
    calls: list[str] = []

    def before(name: str, momentum: float) -> Callable[..., dict[str, Any]]:
        def hook(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            calls.append(name)
            return {**state_dict, "param_groups": [{**g, "momentum": momentum} for g in state_dict["param_groups"]]}

        return hook

    def after(name: str, damping: float) -> Callable[..., None]:
        def hook(optimizer: Optimizer) -> None:
            calls.append(f"{name} with {len(optimizer.state)}")
            optimizer.param_groups[0]["damping"] = damping

        return hook

    optimizer.register_load_state_dict_pre_hook(before("before 1", 0.25))
    optimizer.register_load_state_dict_pre_hook(before("before 2", 0.75), prepend=prepend)
    optimizer.register_load_state_dict_post_hook(after("after 1", 0.5))
    optimizer.register_load_state_dict_post_hook(after("after 2", 2.0), prepend=prepend)
    optimizer.load_state_dict(saved)
    first, last = ("2", "1") if prepend else ("1", "2")
    assert calls == [f"before {first}", f"before {last}", f"after {first} with 2", f"after {last} with 2"]
    assert optimizer.param_groups[0]["momentum"] == (0.25 if prepend else 0.75)
    assert optimizer.param_groups[0]["damping"] == (0.5 if prepend else 2.0)
    problem.take_steps(optimizer, 1)
