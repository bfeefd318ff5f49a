"""Deep copies and pickles of a model and an optimizer that have a counter."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rootfree_kernels import BatchSizeCounter, RFRMSProp
from tests.batch_size.loops import backward, batch, mlp, rmsprop, sizes

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}
copied = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)


def counted_pair(**options: Any) -> tuple[nn.Sequential, RFRMSProp]:
    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer, **options)
    return model, optimizer


def num_optimizers() -> int:
    return sum(issubclass(type(each), torch.optim.Optimizer) for each in gc.get_objects())


@copied
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_a_copy_of_both_counts_on_for_itself(make_copy: Callable[[Any], Any], reverse: bool, times: int) -> None:
    pair = counted_pair(world_size=2)
    backward(pair[0], 100)  # copies have no gradients
    both = pair[::-1] if reverse else pair
    for _ in range(times):
        both = make_copy(both)
    other_model, other = both[::-1] if reverse else both
    model, optimizer = pair
    optimizer.zero_grad()
    backward(model, 4)
    for size in (3, 2):
        backward(other_model, size)
    optimizer.step()
    other.step()
    assert [*sizes(optimizer), *sizes(other)] == [8, 10]
    (counter,) = other._counters
    counter.remove()
    backward(model, 1)
    backward(other_model, 1)
    optimizer.step()
    other.step()
    assert [*sizes(optimizer), *sizes(other)] == [10, 10]
    assert not other_model._forward_hooks and model._forward_hooks


@copied
def test_a_copy_of_the_model_alone_counts_nothing_and_has_no_optimizer(make_copy: Callable[[Any], Any]) -> None:
    model, optimizer = counted_pair()
    before = num_optimizers()
    average = make_copy(model)
    assert num_optimizers() == before
    backward(average, 100)
    backward(model, 7)
    optimizer.step()
    assert sizes(optimizer) == [7]
    again = rmsprop(average)
    BatchSizeCounter(average, again)
    average.zero_grad()
    backward(average, 3)
    again.step()
    assert sizes(again) == [3]


@copied
def test_a_copy_of_the_optimizer_alone_needs_a_new_counter(make_copy: Callable[[Any], Any]) -> None:
    model, optimizer = counted_pair()
    other = make_copy(optimizer)
    assert not any(isinstance(each, nn.Module) for each in gc.get_referents(*other._counters))
    for param in other.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"the counter has no model: .* Make a new BatchSizeCounter, which replaces"):
        other.step()
    other.zero_grad()
    other_model = mlp()
    layers = other_model[0], other_model[2]
    params = iter(other.param_groups[0]["params"])
    for layer in layers:
        layer.weight, layer.bias = next(params), next(params)
    counter = BatchSizeCounter(other_model, other)
    assert other._counters == [counter]
    backward(other_model, 6)
    other.step()
    backward(model, 7)
    optimizer.step()
    assert [*sizes(optimizer), *sizes(other)] == [7, 6]


def test_a_model_that_is_gone_is_an_error_and_not_an_old_batch_size() -> None:
    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(nn.Sequential(model), optimizer)  # the wrapper is dropped, and the model itself is called
    gc.collect()
    backward(model, 7)
    with pytest.raises(RuntimeError, match=r"the counter has no model"):
        optimizer.step()


@copied
def test_a_copied_pair_with_two_counters_keeps_both(make_copy: Callable[[Any], Any]) -> None:
    first, second = mlp(), mlp()
    optimizer = rmsprop(first, second)
    BatchSizeCounter(first, optimizer)
    BatchSizeCounter(second, optimizer)
    first, second, optimizer = make_copy((first, second, optimizer))
    third = nn.Linear(3, 2)
    optimizer.add_param_group({"params": list(third.parameters())})
    BatchSizeCounter(third, optimizer)  # replaces none of the others, although they have seen no call yet
    for model, size in ((first, 2), (second, 3), (third, 4)):
        backward(model, size)
    optimizer.step()
    assert sizes(optimizer) == [2, 3, 4]


def test_counters_survive_loading_a_state_dict() -> None:
    model, optimizer = counted_pair()
    backward(model, 4)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    backward(model, 7)
    optimizer.step()
    assert sizes(optimizer) == [7]
    assert len(optimizer._counters) == len(optimizer._optimizer_step_pre_hooks) == 1


def test_a_pickle_of_before_there_were_counters_loads() -> None:
    optimizer = rmsprop(mlp())
    state = {name: value for name, value in optimizer.__getstate__().items() if name != "_counters"}
    old = RFRMSProp.__new__(RFRMSProp)
    old.__setstate__(state)
    assert old._counters == []


def test_a_shallow_copy_of_the_optimizer_has_the_same_counter() -> None:
    model, optimizer = counted_pair()
    twin = copy.copy(optimizer)
    backward(model, 7)
    twin.step()
    assert sizes(twin) == [7]


def test_a_copy_is_freed_without_the_garbage_collector() -> None:
    model, _ = counted_pair()
    average = copy.deepcopy(model)
    average(batch(2)).sum().backward()
    ref = weakref.ref(average)
    gc.disable()
    try:
        del average
        assert ref() is None
    finally:
        gc.enable()
