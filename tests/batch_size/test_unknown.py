"""A step whose batch size cannot be known is an error, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rootfree_kernels import BatchSizeCounter, RFRMSProp
from tests.batch_size.loops import backward, batch, mlp, rmsprop, sizes


def step_fails(model: nn.Module, optimizer: RFRMSProp, message: str) -> None:
    """Expect that the step raises, changes nothing, and that the next batch is counted."""
    before = [param.detach().clone() for param in model.parameters()]
    message = rf"the batch_size of RFRMSProp cannot be counted: .*{message}.* remove\(\) the counter and set group"
    for _ in range(2):  # a repeated step does not guess either
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    assert sizes(optimizer) == [999]
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    backward(model, 5)
    optimizer.step()
    assert sizes(optimizer) == [5]


def counted_pair() -> tuple[nn.Sequential, RFRMSProp]:
    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    return model, optimizer


# ---- gradients that no counted call explains ---------------------------------------------------------------------


def test_gradients_without_a_counted_call() -> None:
    model, optimizer = counted_pair()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    step_fails(model, optimizer, "Call that model itself, and not a part of it")


def test_a_pass_that_goes_around_the_model_s_call() -> None:
    model, optimizer = counted_pair()
    backward(model, 7)
    backward(model[:2], 3)  # layers of the model
    step_fails(model, optimizer, "without going through a call of the model")


def test_a_penalty_with_a_pass_of_its_own() -> None:
    model, optimizer = counted_pair()
    backward(model, 7)
    model[0].weight.square().sum().backward()
    step_fails(model, optimizer, r"add a penalty to the loss, and call backward\(\) once")


def test_gradients_from_before_the_counter() -> None:
    model = mlp()
    optimizer = rmsprop(model)
    backward(model, 7)
    BatchSizeCounter(model, optimizer)
    backward(model, 5)
    step_fails(model, optimizer, "held something before the first backward pass")


def test_gradients_that_were_all_replaced_before_the_step() -> None:
    model, optimizer = counted_pair()
    backward(model, 7)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    step_fails(model, optimizer, r"replaced after the last backward pass .* p.grad.copy_")


def test_gradients_that_were_all_replaced_between_two_passes() -> None:
    model, optimizer = counted_pair()
    backward(model, 7)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    backward(model, 7)
    step_fails(model, optimizer, "held something before the first backward pass")


def test_gradients_of_which_some_were_discarded() -> None:
    model, optimizer = counted_pair()
    backward(model, 7)
    model[0].zero_grad()
    backward(model, 7)
    step_fails(model, optimizer, "some gradients were discarded between two backward passes")


def test_gradients_that_are_discarded_after_every_pass_are_no_error() -> None:
    model, optimizer = counted_pair()
    for size in (7, 5):
        backward(model, size)
        model[0].zero_grad()  # these layers are not trained
    optimizer.step()
    assert sizes(optimizer) == [12]


class Fails(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    @staticmethod
    def forward(ctx: object, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        raise MemoryError("out of memory")


class FailsHalfway(nn.Module):
    """Layers whose backward pass raises, on demand, after the last layer has its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.fails = False

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.second(Fails.apply(hidden) if self.fails else hidden)


def halfway(model: FailsHalfway, size: int) -> None:
    model.fails = True
    with pytest.raises(MemoryError):
        backward(model, size)
    model.fails = False


@pytest.mark.parametrize("more", [False, True])
def test_a_backward_pass_that_raised(more: bool) -> None:
    model = FailsHalfway()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    halfway(model, 7)
    if more:
        backward(model, 7)
    step_fails(model, optimizer, r"a backward pass raised .* Call zero_grad\(\)")


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_backward_pass_that_raised_and_whose_gradients_were_discarded_is_no_error(set_to_none: bool) -> None:
    model = FailsHalfway()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    halfway(model, 7)
    optimizer.zero_grad(set_to_none=set_to_none)
    backward(model, 5)
    optimizer.step()
    assert sizes(optimizer) == [5]


def checkpointed(model: nn.Module) -> None:
    checkpoint(model, batch(5).requires_grad_(), use_reentrant=True).mean().backward()


def test_a_pass_after_one_that_raised_is_a_pass_of_its_own() -> None:
    model = FailsHalfway()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    early = model(batch(5)).mean()
    for run in (early.backward, lambda: checkpointed(model)):  # neither has an ordinary forward call before it
        halfway(model, 7)
        optimizer.zero_grad()
        run()
        optimizer.step()
        assert sizes(optimizer) == [5]
        optimizer.zero_grad()


def test_parameters_that_have_left_the_model() -> None:
    model, optimizer = counted_pair()
    old, model[0], model[2] = model[:], nn.Linear(3, 4), nn.Linear(4, 2)
    backward(model, 7)
    backward(old, 7)
    with pytest.raises(RuntimeError, match="the batch_size of RFRMSProp cannot be counted"):
        optimizer.step()


def test_a_closure_that_counts_nothing() -> None:
    model, optimizer = counted_pair()
    with pytest.raises(RuntimeError, match="no backward pass went through a call of the model"):
        optimizer.step(lambda: model[:2](batch(3)).sum().backward())


# ---- several calls in one backward pass --------------------------------------------------------------------------


def two_batches(model: nn.Module, sizes: tuple[int, int]) -> None:
    (model(batch(sizes[0])).mean() + model(batch(sizes[1])).mean()).backward()


def two_checkpoints(model: nn.Module, sizes: tuple[int, int]) -> None:
    losses = [checkpoint(model, batch(size).requires_grad_(), use_reentrant=True).mean() for size in sizes]
    sum(losses).backward()


SEVERAL = {"two batches": two_batches, "two reentrant checkpoints": two_checkpoints}


@pytest.mark.parametrize("run", SEVERAL.values(), ids=SEVERAL)
def test_several_calls_in_one_backward_pass(run: Callable[[nn.Module, tuple[int, int]], None]) -> None:
    model, optimizer = counted_pair()
    run(model, (8, 4))  # does not raise in the backward pass
    step_fails(model, optimizer, "2 calls of the model, of 4, 8 terms, and calls_in_one_backward=None")


@pytest.mark.parametrize("run", SEVERAL.values(), ids=SEVERAL)
@pytest.mark.parametrize(("meaning", "size", "expected"), [("add", 4, 24), ("same", 8, 16)])
def test_several_calls_whose_meaning_was_said(
    run: Callable[[nn.Module, tuple[int, int]], None], meaning: str, size: int, expected: int
) -> None:
    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer, calls_in_one_backward=meaning)
    for _ in range(2):
        run(model, (8, size))
    optimizer.step()
    assert sizes(optimizer) == [expected]


def test_calls_that_should_have_the_same_terms_but_have_not() -> None:
    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer, calls_in_one_backward="same")
    two_batches(model, (8, 4))
    step_fails(model, optimizer, "calls_in_one_backward='same', but .* calls of 4, 8 terms")


def test_the_calls_of_a_recurrent_cell_see_the_same_terms() -> None:
    model = nn.RNNCell(3, 3)
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer, calls_in_one_backward="same")
    hidden = torch.zeros(6, 3)
    for _ in range(4):
        hidden = model(batch(6), hidden)
    hidden.sum().backward()
    optimizer.step()
    assert sizes(optimizer) == [6]


# ---- constructors ------------------------------------------------------------------------------------------------


def test_a_constructor_that_fails_leaves_nothing_hooked() -> None:
    model = mlp()
    ours, sgd = rmsprop(model), torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = len(ours._optimizer_step_pre_hooks)
    with pytest.raises(ValueError, match="optimizer=SGD has groups without a batch_size: pass RFRMSProp or IFShampoo"):
        BatchSizeCounter(model, sgd)
    with pytest.raises(ValueError, match="optimizer=RFRMSProp has no parameter of model=Linear: pass the model whose"):
        BatchSizeCounter(nn.Linear(3, 2), ours)
    with pytest.raises(ValueError, match="calls_in_one_backward='sum': choose one of add, same, or None"):
        BatchSizeCounter(model, ours, calls_in_one_backward="sum")
    assert not model._forward_hooks and ours._counters == []
    assert len(ours._optimizer_step_pre_hooks) == hooks and not sgd._optimizer_step_pre_hooks
