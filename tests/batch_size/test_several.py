"""Several models, optimizers, groups and counters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rootfree_kernels import BatchSizeCounter, RFRMSProp
from tests.batch_size.loops import backward, batch, mlp, rmsprop, sizes


def test_two_models_with_one_optimizer() -> None:
    first, second, uncounted = mlp(), mlp(), mlp()
    optimizer = rmsprop(first, second, uncounted)
    counters = BatchSizeCounter(first, optimizer), BatchSizeCounter(second, optimizer)
    seen = []
    for size in (8, 6):
        optimizer.zero_grad()
        backward(first, size)
        backward(second, 2 * size)
        backward(uncounted, 100)
        optimizer.step()
        seen.append(sizes(optimizer))
    assert seen == [[8, 16, 999], [6, 12, 999]]
    counters[0].remove()
    optimizer.zero_grad()
    for model in (first, second):
        backward(model, 5)
    optimizer.step()
    assert sizes(optimizer) == [6, 5, 999]


def test_a_step_on_one_of_two_models_keeps_the_batch_size_of_the_other() -> None:
    first, second = mlp(), mlp()
    optimizer = rmsprop(first, second)
    BatchSizeCounter(first, optimizer)
    BatchSizeCounter(second, optimizer)
    backward(first, 8)
    optimizer.step()
    assert sizes(optimizer) == [8, 999]


@pytest.mark.parametrize("penalty_reaches_the_critic", [False, True])
def test_a_generator_and_a_critic_with_an_optimizer_each(penalty_reaches_the_critic: bool) -> None:
    generator, critic = nn.Linear(3, 3), mlp()
    of_generator, of_critic = rmsprop(generator), rmsprop(critic)
    BatchSizeCounter(generator, of_generator)
    BatchSizeCounter(critic, of_critic)
    seen = []
    for size in (8, 6):
        of_critic.zero_grad(set_to_none=size == 8)
        backward(critic, size)  # on samples
        critic(generator(batch(size)).detach()).square().mean().backward()
        of_critic.step()
        of_generator.zero_grad()
        critic.requires_grad_(penalty_reaches_the_critic)
        critic(generator(batch(2 * size))).mean().backward()
        critic.requires_grad_(True)
        of_generator.step()
        seen.append([*sizes(of_critic), *sizes(of_generator)])
    assert seen == [[16, 16], [12, 12]]


def test_one_model_with_two_optimizers_of_which_one_steps_less_often() -> None:
    model = mlp()
    often, seldom = rmsprop(model[0]), rmsprop(model[2])
    BatchSizeCounter(model, often)
    BatchSizeCounter(model, seldom)
    seen = []
    for index in range(4):
        backward(model, 3)
        often.step()
        often.zero_grad()
        if index % 2:
            seldom.step()
            seldom.zero_grad()
            seen.append([*sizes(often), *sizes(seldom)])
    assert seen == [[3, 6]] * 2


def test_a_parameter_outside_of_the_model_may_be_in_a_group() -> None:
    model, scale, apart = mlp(), nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    optimizer = RFRMSProp([{"params": [*model.parameters(), scale]}, {"params": [apart]}], batch_size=999)
    BatchSizeCounter(model, optimizer)
    (model(batch(7)).mean() * scale * apart).backward()
    optimizer.step()
    assert sizes(optimizer) == [7, 999]


# ---- counters of the same group ----------------------------------------------------------------------------------


def one_group(*models: nn.Module) -> RFRMSProp:
    optimizer = RFRMSProp([param for model in models for param in model.parameters()], batch_size=999)
    for model in models:
        BatchSizeCounter(model, optimizer)
    return optimizer


def test_counters_of_the_same_group_must_agree() -> None:
    first, second = mlp(), mlp()
    optimizer = one_group(first, second)
    backward(first, 8)
    backward(second, 6)
    with pytest.raises(RuntimeError, match=r"counted 8 and 6 for the same group\. Give the parameters of every model"):
        optimizer.step()
    assert sizes(optimizer) == [999]
    optimizer.zero_grad()
    backward(first, 5)
    backward(second, 5)
    optimizer.step()
    assert sizes(optimizer) == [5]


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_counter_whose_gradients_are_zero_leaves_the_group_to_the_other(set_to_none: bool) -> None:
    models = mlp(), mlp()
    optimizer = one_group(*models)
    seen = []
    for index, size in enumerate((8, 6, 4)):
        backward(models[index % 2], size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        seen += sizes(optimizer)
    assert seen == [8, 6, 4]


def test_two_models_that_share_layers_count_each_other_s_passes() -> None:
    trunk = nn.Linear(3, 3)
    actor, critic = nn.Sequential(trunk, nn.Linear(3, 2)), nn.Sequential(trunk, nn.Linear(3, 1))
    optimizer = RFRMSProp([*actor.parameters(), *critic[1].parameters()], batch_size=999)
    BatchSizeCounter(actor, optimizer)
    BatchSizeCounter(critic, optimizer)
    for size in (8, 6):
        optimizer.zero_grad()
        backward(actor, size)
        backward(critic, size)
        optimizer.step()
        assert sizes(optimizer) == [size]
    optimizer.zero_grad()
    backward(critic, 5)
    optimizer.step()
    assert sizes(optimizer) == [5]
