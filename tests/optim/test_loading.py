"""A state dict is loaded as a whole or not at all, and what it becomes does not depend on the surroundings."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rootfree_kernels import IFShampoo
from tests.calls.optimizers import OPTIONS, Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits
from tests.optim.checkpoints import FIRST, SECOND, every_fourth, through_file

MAKES_MEMORY = ("_to_copy", "clone", "empty", "zeros", "full", "lift", "copy")


class FullMemory(TorchDispatchMode):
    """Memory that has room for some allocations and for no more."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in func.name() for name in MAKES_MEMORY):
            if not self.room:
                raise torch.OutOfMemoryError("no memory left")
            self.room -= 1
        return func(*args, **(kwargs or {}))


def resumed(case: Case, load: Callable[[torch.optim.Optimizer, dict[str, Any]], None], **changes: Any) -> Any:
    """Return all weights and state of a run in which `load` is called between the steps."""
    model, optimizer = case.start(**changes)
    train(model, optimizer, FIRST)
    load(optimizer, copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, SECOND)
    return snapshot(optimizer)


def other_run(case: Case, steps: range) -> tuple[Model, torch.optim.Optimizer]:
    """Return a run with other options, whose learning rate is a Tensor."""
    model, optimizer = case.start(lr=torch.tensor(0.02), momentum=0.5)
    train(model, optimizer, steps)
    return model, optimizer


@pytest.mark.parametrize("steps", [range(0), SECOND], ids=["new", "stepped"])
@pytest.mark.parametrize("fails", ["first", "second", "middle", "last"])
def test_a_load_without_enough_memory_changes_nothing(case: Case, fails: str, steps: range) -> None:
    model, optimizer = case.start(lr=torch.tensor(0.01))
    train(model, optimizer, FIRST)
    saved = through_file(optimizer.state_dict())
    with FullMemory(10_000) as memory:
        other_run(case, range(0))[1].load_state_dict(saved)
    with FullMemory(10_000) as made:
        other_run(case, range(0))
    needed = made.room - memory.room
    room = {"first": 0, "second": 1, "middle": needed // 2, "last": needed - 1}[fails]

    model, optimizer = other_run(case, steps)
    groups = [dict(group) for group in optimizer.param_groups]
    tensors = {param: dict(state) for param, state in optimizer.state.items()}
    with pytest.raises(torch.OutOfMemoryError), FullMemory(room):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups == groups
    assert optimizer.state.keys() == tensors.keys()
    assert all(optimizer.state[p][name] is x for p, state in tensors.items() for name, x in state.items())

    train(model, optimizer, [10, 11])
    assert_same_bits(snapshot(optimizer), snapshot(other_run(case, [*steps, 10, 11])[1]))


def test_a_load_allocates_each_state_tensor_once(case: Case) -> None:
    """A cast to the dtype of the parameter and back would take twice the memory."""
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved = through_file(optimizer.state_dict())
    with FullMemory(10_000) as memory:
        optimizer.load_state_dict(saved)
    assert 10_000 - memory.room == sum(map(len, saved["state"].values()))


def test_a_warning_that_is_an_error_leaves_the_optimizer_as_it_was() -> None:
    def run(frequency: Any) -> tuple[Model, IFShampoo]:
        model = Model()
        optimizer = IFShampoo(model.parameters(), **OPTIONS, precondition_frequency=frequency)
        train(model, optimizer, FIRST)
        return model, optimizer

    _, optimizer = run(2)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="saved as a callable"):
        warnings.simplefilter("error")
        optimizer.load_state_dict(run(every_fourth)[1].state_dict())
    assert_same_bits(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("changes", [{}, {"capturable": True, "precondition_frequency": 1}], ids=["host", "capturable"])
def test_a_default_device_changes_nothing(case: Case, changes: dict[str, Any]) -> None:
    if not case.is_shampoo:
        changes = {name: value for name, value in changes.items() if name == "capturable"}

    def load(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        torch.set_default_device("meta")
        try:
            optimizer.load_state_dict(saved)
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            torch.set_default_device(None)

    assert_same_bits(resumed(case, load, **changes), resumed(case, lambda optimizer, saved: None, **changes))


@pytest.mark.parametrize("as_number", [float, int])
def test_a_step_count_that_was_saved_as_a_number_is_loaded(case: Case, as_number: Callable[[Any], Any]) -> None:
    """Optimizers of PyTorch once saved it so, and some tools write plain numbers in the place of scalars."""

    def load(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        for state in saved["state"].values():
            state["step"] = as_number(state["step"])
        optimizer.load_state_dict(saved)

    assert_same_bits(resumed(case, load), resumed(case, lambda optimizer, saved: None))


def test_the_dtype_of_the_saved_state_does_not_matter(case: Case) -> None:
    """FP64 holds every value exactly."""

    def load(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        for state in saved["state"].values():
            state.update({name: value.double() for name, value in state.items()})
        optimizer.load_state_dict(saved)

    assert_same_bits(resumed(case, load), resumed(case, lambda optimizer, saved: None))


def test_entries_of_the_state_that_belong_to_no_parameter_are_loaded(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    optimizer.state["epochs"] = {"seen": 3}
    loaded = case.start()[1]
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    assert loaded.state["epochs"] == {"seen": 3}


@pytest.mark.parametrize("prepend", [False, True], ids=["appended", "prepended"])
def test_load_hooks_see_the_whole_state_dict_and_then_the_loaded_optimizer(case: Case, prepend: bool) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved, at_save = through_file(optimizer.state_dict()), snapshot(optimizer)
    seen: list[Any] = []
    loaded = case.start()[1]

    def before(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append({index: sorted(state) for index, state in state_dict["state"].items()})
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def afterwards(optimizer: torch.optim.Optimizer) -> None:
        seen.append({name: x for name, x in snapshot(optimizer).items() if not name.endswith(" weight")})
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()

    loaded.register_load_state_dict_pre_hook(before, prepend=prepend)
    loaded.register_load_state_dict_post_hook(afterwards, prepend=prepend)
    loaded.load_state_dict(saved)
    assert seen[0] == {index: sorted(state) for index, state in saved["state"].items()}
    assert_same_bits(seen[1], {name: x for name, x in at_save.items() if not name.endswith(" weight")})
    assert loaded.param_groups[0]["lr"] == 0.5
    assert all(not state["momentum_buffer"].any() for state in loaded.state.values())


def test_hooks_that_a_load_needs_are_gone_after_it(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    before = len(optimizer._optimizer_load_state_dict_pre_hooks), len(optimizer._optimizer_load_state_dict_post_hooks)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict({})
    after = len(optimizer._optimizer_load_state_dict_pre_hooks), len(optimizer._optimizer_load_state_dict_post_hooks)
    assert after == before


@pytest.mark.parametrize("kind", [int, float, torch.tensor], ids=["int", "float", "tensor"])
def test_a_large_count_of_steps_is_loaded_exactly(case: Case, kind: Callable[[Any], Any]) -> None:
    """FP32 has no odd numbers above 2²⁴."""
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = kind(2**24 + 1)
    optimizer.load_state_dict(saved)
    assert all(int(state["step"]) == 2**24 + 1 for state in optimizer.state.values())
