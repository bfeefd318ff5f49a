"""The batch size is the number of terms that the gradients of a step are made of."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from rootfree_kernels import BatchSizeCounter, IFShampoo, RFRMSProp
from tests.batch_size.loops import Keyword, backward, batch, mlp, rmsprop, sizes

Model = nn.Module
Optimizer = torch.optim.Optimizer


def counted(run: Callable[[Model, RFRMSProp], Any], model: Model | None = None, **options: Any) -> int:
    """Return the batch_size of a step after `run(model, optimizer)`."""
    model = model or mlp()
    optimizer = rmsprop(model)
    with BatchSizeCounter(model, optimizer, **options):
        run(model, optimizer)
        optimizer.step()
    return sizes(optimizer)[0]


# ---- terms -------------------------------------------------------------------------------------------------------


def test_a_forward_call_with_keywords_only_is_counted() -> None:
    assert counted(lambda model, _: model(inputs=batch(7)).sum().backward(), Keyword()) == 7


def test_the_world_size_multiplies_and_terms_may_be_counted_by_a_function() -> None:
    def elements(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return args[0].numel()

    assert counted(lambda model, _: backward(model, 7), world_size=4) == 28
    assert counted(lambda model, _: backward(model, 7), count_terms=elements) == 21


@pytest.mark.parametrize("wrong", [2.5, -1, None, "eight"])
def test_a_number_of_terms_that_is_no_whole_number_is_an_error(wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"count_terms returned {wrong!r}: return a whole number, 0 or more"):
        counted(lambda model, _: backward(model, 7), count_terms=lambda args, kwargs: wrong)


def test_a_forward_call_without_a_tensor_needs_a_function_of_its_own() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5, 2))

        def forward(self, rows: list[int]) -> Tensor:
            return self.weight[rows]

    run = lambda model, _: model([1, 2, 3]).sum().backward()  # noqa: E731
    with pytest.raises(ValueError, match="no tensor with an axis to count by: pass count_terms"):
        counted(run, Table())
    assert counted(run, Table(), count_terms=lambda args, kwargs: len(args[0])) == 3


# ---- outputs -----------------------------------------------------------------------------------------------------


@dataclass
class Output:
    loss: Tensor
    name: str = "output"


class Pair(NamedTuple):
    first: Tensor
    second: Any


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "dataclass": Output,
    "named tuple": lambda y: Pair(y, None),
    "nested": lambda y: {"layers": [(Output(y), 3)], "loss": y.sum()},
    "distribution": lambda y: Normal(y, 1.0),
}
LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "tensor": lambda output: output.sum(),
    "dataclass": lambda output: output.loss.sum(),
    "named tuple": lambda output: output.first.sum(),
    "nested": lambda output: output["layers"][0][0].loss.sum() + output["loss"],
    "distribution": lambda output: -output.log_prob(torch.ones(())).mean(),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_call_counts_once_whatever_its_output_is(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Any:
            return OUTPUTS[kind](self.inner(inputs))

    assert counted(lambda model, _: LOSSES[kind](model(batch(6))).backward(), Model()) == 6


def test_an_output_that_is_changed_in_place_counts() -> None:
    assert counted(lambda model, _: model(batch(6)).div_(2.0).sum().backward()) == 6


# ---- what counts -------------------------------------------------------------------------------------------------


def test_micro_batches_add_up_also_in_a_shorter_last_group() -> None:
    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    seen = []
    for index, size in enumerate((8, 8, 8, 8, 3)):
        (model(batch(size)).square().mean() / 2).backward()
        if index % 2 or index == 4:
            optimizer.step()
            optimizer.zero_grad()
            seen += sizes(optimizer)
    assert seen == [16, 16, 3]


def test_a_skipped_batch_does_not_count() -> None:
    def run(model: Model, optimizer: Optimizer) -> None:
        model(batch(100)).square().mean()  # no backward pass
        backward(model, 100)
        optimizer.zero_grad()  # the gradients are thrown away
        backward(model, 7)

    assert counted(run) == 7


def test_evaluation_does_not_count_and_a_backward_pass_in_evaluation_mode_does() -> None:
    def run(model: Model, _: Optimizer) -> None:
        backward(model, 7)
        model.eval()
        model(batch(100))
        with torch.no_grad():
            model(batch(100))
        backward(model, 5)

    assert counted(run) == 12


def test_gradients_that_do_not_reach_the_parameters_do_not_count() -> None:
    def run(model: Model, _: Optimizer) -> None:
        backward(model, 7)
        inputs = batch(100).requires_grad_()
        torch.autograd.grad(model(inputs).sum(), inputs)
        torch.autograd.grad(model(batch(100)).sum(), list(model.parameters()))
        functional = lambda params: functional_call(model, params, (batch(100),)).sum()  # noqa: E731
        grad(functional)({name: param.detach() for name, param in model.named_parameters()})
        model.requires_grad_(False)
        model(inputs).sum().backward()
        model.requires_grad_(True)
        for param in model.parameters():
            param.grad.mul_(0.5)  # a change after passes that changed nothing

    assert counted(run) == 7


def test_a_call_inside_a_function_transform_is_left_alone() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.weight * inputs

    def run(model: Model, _: Optimizer) -> None:
        model(torch.randn(7)).mean().backward()
        loss = lambda weight, sample: functional_call(model, {"weight": weight}, (sample,))  # noqa: E731
        vmap(grad(loss), in_dims=(None, 0))(model.weight.detach(), torch.randn(100))  # a sample has no axis to count

    assert counted(run, Scale()) == 7


def test_two_backward_passes_through_one_call_have_the_same_terms() -> None:
    def run(model: Model, _: Optimizer) -> None:
        output = model(batch(7))
        output.mean().backward(retain_graph=True)
        output.square().mean().backward()
        backward(model, 5)

    assert counted(run) == 12


def test_passes_with_create_graph_count() -> None:
    def run(model: Model, _: Optimizer) -> None:
        for size in (7, 5):
            model(batch(size)).square().mean().backward(create_graph=True)

    with pytest.warns(UserWarning, match="create_graph"):
        assert counted(run) == 12


def test_a_penalty_on_the_gradient_in_the_loss_adds_no_terms() -> None:
    def run(model: Model, _: Optimizer) -> None:
        inputs = batch(7).requires_grad_()
        output = model(inputs).square().mean()
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        (output + slope.square().sum()).backward()

    assert counted(run) == 7


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_call_that_checkpointing_repeats_counts_once(use_reentrant: bool) -> None:
    def run(model: Model, _: Optimizer) -> None:
        for size in (7, 5):
            inputs = batch(size).requires_grad_()
            checkpoint(model, inputs, use_reentrant=use_reentrant).mean().backward()

    assert counted(run) == 12


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_inside_the_model_changes_nothing(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Any:
            hidden = checkpoint(self.first, inputs.requires_grad_(), use_reentrant=use_reentrant)
            return checkpoint(self.second, hidden, use_reentrant=use_reentrant)

    def run(model: Model, _: Optimizer) -> None:
        backward(model, 7)
        backward(model, 5)

    assert counted(run, Checkpointed()) == 12


# ---- where a count begins ----------------------------------------------------------------------------------------


def discard_by_data(optimizer: Optimizer) -> None:
    """Set the gradients to zero as old programs do, behind the back of autograd."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                param.grad.data.zero_()


DISCARD: dict[str, Callable[[Model, Optimizer], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, to zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "data": lambda model, optimizer: discard_by_data(optimizer),
}


@pytest.mark.parametrize("order", ["before the forward call", "after the forward call"])
@pytest.mark.parametrize("discard", DISCARD.values(), ids=DISCARD)
@pytest.mark.parametrize("scale_is_outside", [False, True], ids=["", "with a parameter outside of the call"])
def test_a_count_begins_where_the_gradients_were_discarded(
    discard: Callable[[Model, Optimizer], None], order: str, scale_is_outside: bool
) -> None:
    model = mlp()
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    seen = []
    for size in (4, 6, 5):
        for micro_batch in range(2):
            if micro_batch == 0 and order == "before the forward call":
                discard(model, optimizer)
            output = model(batch(size))
            if micro_batch == 0 and order == "after the forward call":
                discard(model, optimizer)
            # The gradient of this scale comes before that of the output.
            loss = output.square().mean() * (model.scale.exp() if scale_is_outside else 1.0)
            loss.backward()
        optimizer.step()
        seen += sizes(optimizer)
    assert seen == [8, 12, 10]


def test_small_gradients_are_not_zero() -> None:
    def run(model: Model, _: Optimizer) -> None:
        for size in (7, 5):
            (model(batch(size)).mean() * 1e-30).backward()

    assert counted(run) == 12


def test_a_micro_batch_whose_gradient_is_zero_counts() -> None:
    def run(model: Model, _: Optimizer) -> None:
        for size, factor in ((7, 0.0), (5, 0.0), (3, 1.0)):
            (model(batch(size)).mean() * factor).backward()

    assert counted(run) == 15


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_batch_whose_gradient_is_zero_does_not_count_for_the_next_step(set_to_none: bool) -> None:
    def run(model: Model, optimizer: Optimizer) -> None:
        (model(batch(7)).mean() * 0.0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        backward(model, 5)

    assert counted(run) == 5


def test_gradients_that_are_written_at_the_end_of_the_backward_pass_count() -> None:
    class Sharded(nn.Module):
        """Computes with a copy of its parameter, and moves the gradient at the end, as FSDP does."""

        def __init__(self) -> None:
            super().__init__()
            self.shard = nn.Parameter(torch.randn(3, 2))

        def forward(self, inputs: Tensor) -> Tensor:
            full = self.shard.detach().requires_grad_()

            def move() -> None:
                self.shard.grad = full.grad + (0.0 if self.shard.grad is None else self.shard.grad)

            engine = torch.autograd.Variable._execution_engine
            full.register_hook(lambda grad: engine.queue_callback(move))
            return inputs @ full

    assert counted(lambda model, _: backward(model, 7), Sharded()) == 7


def test_a_step_does_not_discard_what_it_stepped_on() -> None:
    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    backward(model, 7)
    optimizer.step()
    backward(model, 5)
    optimizer.step()
    assert sizes(optimizer) == [12]


def test_a_step_that_raised_and_is_repeated_has_the_same_batch_size() -> None:
    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    backward(model, 7)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr=-1.0"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    assert sizes(optimizer) == [7]


def test_a_sparse_gradient_is_left_to_the_step_to_refuse() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    for _ in range(2):
        model(torch.arange(4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of layout torch.sparse_coo: make it dense"):
        optimizer.step()
    assert sizes(optimizer) == [8]


def test_many_passes_without_a_step_are_counted_and_not_kept() -> None:
    model = mlp()
    optimizer = rmsprop(model)
    counter = BatchSizeCounter(model, optimizer)
    for _ in range(250):
        backward(model, 2)
    assert len(counter._window._passes) <= 101
    optimizer.step()
    assert sizes(optimizer) == [500]


def test_parameters_that_join_later_count() -> None:
    model = mlp()
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    optimizer = RFRMSProp([model[0].weight], batch_size=999)
    BatchSizeCounter(model, optimizer)
    for size in (7, 5):
        optimizer.zero_grad()
        (model(batch(size)).sum() * model.scale.exp()).backward()  # its gradient comes before that of the output
        optimizer.step()
        if size == 7:
            optimizer.add_param_group({"params": [model.scale], "batch_size": 999})
            model.scale.grad = None
    assert sizes(optimizer) == [5, 5]


# ---- steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", [False, True])
def test_passes_inside_a_closure_are_counted(keyword: bool) -> None:
    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    seen = []
    for size in (16, 4):

        def closure(size: int = size) -> Tensor:
            optimizer.zero_grad()
            loss = model(batch(size)).square().mean()
            loss.backward()
            return loss

        assert (optimizer.step(closure=closure) if keyword else optimizer.step(closure)) > 0
        seen += sizes(optimizer)
    assert seen == [16, 4]


def test_a_step_inside_the_backward_pass_knows_its_batch_size() -> None:
    model = mlp()
    optimizers = {param: RFRMSProp([param], batch_size=999) for param in model.parameters()}
    seen = []

    def step(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()
        seen.extend(sizes(optimizers[param]))

    for param, optimizer in optimizers.items():
        BatchSizeCounter(model, optimizer)
        param.register_post_accumulate_grad_hook(step)
    backward(model, 7)
    backward(model, 5)
    assert seen == [7] * 4 + [5] * 4


@pytest.mark.parametrize("discard", [None, "zeros"])
def test_a_step_without_gradients_or_with_gradients_of_zero_keeps_the_batch_size(discard: str | None) -> None:
    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    if discard == "zeros":  # as torch.distributed.checkpoint does, to make the state
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
    optimizer.step()
    assert sizes(optimizer) == [999]


def test_a_count_is_read_from_the_gradients_only_if_they_were_accumulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(tensor: Tensor) -> bool:
        raise AssertionError("a tensor was read")

    model = mlp()
    optimizer = rmsprop(model)
    BatchSizeCounter(model, optimizer)
    for size in (7, 5):
        backward(model, 100)
        backward(model, 100)
        optimizer.zero_grad()
        backward(model, size)
        with monkeypatch.context() as patched:
            patched.setattr(Tensor, "__bool__", read)
            for counter in optimizer._counters:
                counter._set_batch_size(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        assert sizes(optimizer) == [size]


# ---- the end -----------------------------------------------------------------------------------------------------


class WithParameter(nn.Module):
    """A model that returns a parameter beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(inputs), self.inner.bias


def test_a_removed_counter_leaves_nothing_behind() -> None:
    model = WithParameter()
    optimizer = rmsprop(model)
    before = len(optimizer._optimizer_step_pre_hooks)
    counter = BatchSizeCounter(model, optimizer)
    output, _ = model(batch(7))
    counter.remove()
    counter.remove()
    output.sum().backward()  # its hook is still there, and does nothing
    optimizer.step()
    assert sizes(optimizer) == [999]
    assert optimizer._counters == []
    assert not model._forward_hooks and not model._forward_hooks_with_kwargs
    assert not any(param._backward_hooks for param in model.parameters())
    assert len(optimizer._optimizer_step_pre_hooks) == before
    assert counter._open is None and counter._last_task == -1 and not counter._window._passes


def test_outputs_gradients_and_the_model_are_not_kept_alive() -> None:
    model = mlp()
    optimizer = rmsprop(model)
    counter = BatchSizeCounter(model, optimizer)
    output = model(batch(7))
    output.sum().backward()
    grads = [param.grad for param in model.parameters()]
    optimizer.step()
    alive = [weakref.ref(each) for each in (output, *grads, model, optimizer)]
    gc.disable()
    try:
        del output, grads
        optimizer.zero_grad()
        assert [ref() is not None for ref in alive] == [False] * 5 + [True, True]
    finally:
        gc.enable()
    del model, optimizer
    gc.collect()  # an optimizer's step hooks are in a cycle with it
    assert not any(ref() for ref in alive)
    counter.remove()


def test_it_counts_for_shampoo() -> None:
    model = mlp()
    optimizer = IFShampoo(model.parameters(), batch_size=1)
    BatchSizeCounter(model, optimizer)
    backward(model, 7)
    optimizer.step()
    assert sizes(optimizer) == [7]
