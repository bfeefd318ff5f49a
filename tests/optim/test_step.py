"""Steps behave as in PyTorch's optimizers: closures, modes, hooks, options and schedules."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from tests.calls.optimizers import SHAPES, Case, Model, gradients, snapshot, train
from tests.calls.tensors import assert_same_bits, same_bits
from tests.optim.runs import AFTER, BEFORE, results, set_gradients, trained

# ---- closures, modes, hooks, counts ----------------------------------------------------------------------------------


def test_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned(case: Case) -> None:
    model, optimizer = case.start()
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert seen == [True]
    assert loss.item() == Model(case.dtype)(0).item()
    assert_same_bits(snapshot(optimizer), results(case, [0]))
    assert optimizer.step() is None


def test_step_builds_no_graph_and_restores_the_grad_mode(case: Case) -> None:
    model, optimizer = trained(case)
    assert torch.is_grad_enabled()
    assert all(param.is_leaf and param.requires_grad for param in model.parameters())
    assert not any(value.requires_grad for state in optimizer.state.values() for value in state.values())


def test_step_hooks_run(case: Case) -> None:
    model, optimizer = case.start()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(model.weight.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: calls.append(model.weight.detach().clone()))
    start = model.weight.detach().clone()
    train(model, optimizer, [0])
    before, after = calls
    assert same_bits(before, start)
    assert same_bits(after, model.weight) and not same_bits(before, after)


def test_step_counts_the_calls_with_a_gradient(case: Case) -> None:
    _, optimizer = trained(case)
    optimizer.zero_grad()
    optimizer.step()
    assert [state["step"].item() for state in optimizer.state.values()] == [3] * len(SHAPES)


def test_gradients_do_not_change(case: Case) -> None:
    model, optimizer = trained(case)
    grads = {name: param.grad for name, param in model.named_parameters()}
    copies = {name: grad.clone() for name, grad in grads.items()}
    optimizer.step()
    assert all(param.grad is grads[name] for name, param in model.named_parameters())
    assert_same_bits(grads, copies)


def test_gradients_are_negated_and_unscaled_in_a_copy(case: Case) -> None:
    for foreach in (None, False):
        model, optimizer = case.start(maximize=True, foreach=foreach)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        model(0).backward()
        copies = {name: param.grad.clone() for name, param in model.named_parameters()}
        optimizer.step()
        assert_same_bits({name: param.grad for name, param in model.named_parameters()}, copies)


def test_the_global_generators_are_never_touched(case: Case) -> None:
    model, optimizer = case.start()
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    train(model, optimizer, BEFORE)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_results_do_not_depend_on_the_global_generator(case: Case) -> None:
    torch.manual_seed(1)
    first = results(case)
    torch.manual_seed(2)
    assert_same_bits(results(case), first)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference-mode": torch.inference_mode,
    "default-dtype": lambda: default_dtype(torch.float64),
    "default-device": lambda: torch.device("meta"),  # an example of another device
}


@pytest.mark.parametrize("mode", AMBIENT)
def test_context_managers_do_not_change_a_step(case: Case, mode: str) -> None:
    model, optimizer = case.start()
    for step in BEFORE:
        optimizer.zero_grad()
        model(step).backward()
        with AMBIENT[mode]():
            optimizer.step()
    assert_same_bits(snapshot(optimizer), results(case))


# ---- options of every optimizer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])
def test_lr_may_be_a_tensor(case: Case, shape: tuple[int, ...]) -> None:
    assert_same_bits(results(case, lr=torch.full(shape, 0.01)), results(case, lr=0.01))


def test_an_lr_tensor_changed_in_place_takes_effect(case: Case) -> None:
    lr = torch.tensor(0.01)
    model, optimizer = trained(case, lr=lr)
    lr.fill_(0.5)
    train(model, optimizer, AFTER)
    model, expected = trained(case)
    expected.param_groups[0]["lr"] = 0.5
    train(model, expected, AFTER)
    assert_same_bits(snapshot(optimizer), snapshot(expected))
    assert optimizer.param_groups[0]["lr"] is lr


def test_maximize_is_a_step_along_the_negated_gradient(case: Case) -> None:
    model, optimizer = case.start()
    for step in BEFORE:
        optimizer.zero_grad()
        (-model(step)).backward()
        optimizer.step()
    assert_same_bits(results(case, maximize=True), snapshot(optimizer))


@pytest.mark.parametrize("foreach", [False, True])
def test_foreach_does_not_change_the_result(case: Case, foreach: bool) -> None:
    """Results are bitwise equal, because blocks are small. A batch may sum larger products in another order."""
    assert_same_bits(results(case, foreach=foreach), results(case, foreach=None))


def test_foreach_agrees_at_larger_sizes(case: Case) -> None:
    """FP64 is never rounded to a storage dtype. Another order of summation of 64 terms changes a sum by 64 · 1e-16."""
    wide = {"factor_dtype": torch.float64} if case.is_shampoo else {}

    def run(foreach: bool) -> list[Tensor]:
        params = [nn.Parameter(value) for value in gradients([(64, 48)] * 3 + [(64,)] * 2, -1, torch.float64)]
        changes = {"max_preconditioner_dim": 32} if "max_preconditioner_dim" in case.options else {}
        optimizer = case.make(params, foreach=foreach, **wide, **changes)
        for step in BEFORE:
            set_gradients(params, step)
            optimizer.step()
        return [param.detach() for param in params]

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


def test_fused_false_is_eager_pytorch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    not_fused = results(case, fused=False)
    monkeypatch.setenv("ROOTFREE_BACKEND", "eager")
    assert_same_bits(not_fused, results(case))


def test_fused_true_says_why_no_kernel_can_run(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rootfree_kernels.native._build_problem", lambda backend: "it was not built")
    model = Model(case.dtype)
    params = list(model.parameters())
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:]}])
    for steps in ((), BEFORE):  # without state and with it
        optimizer.param_groups[1]["fused"] = None
        train(model, optimizer, steps)
        before = snapshot(optimizer)
        optimizer.param_groups[1]["fused"] = True
        set_gradients(params, 0)
        with pytest.raises(RuntimeError, match=r"fused=True .* cpp: "):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)


def test_capturable_keeps_the_result(case: Case) -> None:
    if case.options.get("precondition_frequency", 1) != 1:
        with pytest.raises(ValueError, match=r"precondition_frequency=3 with capturable=True"):
            case.start(capturable=True)
        return
    assert_same_bits(results(case, capturable=True), results(case))


def test_repr_shows_the_options(case: Case) -> None:
    text = repr(case.start()[1])
    assert text.startswith(case.optimizer.__name__)
    assert "batch_size: 4" in text


# ---- learning rate schedules -----------------------------------------------------------------------------------------


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=6),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=6),  # also changes the momentum
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_schedulers_set_lr_and_momentum_of_the_next_step(case: Case, scheduler: str, as_tensor: bool) -> None:
    """The run equals a run in which lr and momentum are set by hand."""
    model, optimizer = case.start(lr=torch.tensor(0.01) if as_tensor else 0.01)
    original, (group,) = optimizer.param_groups[0]["lr"], optimizer.param_groups
    schedule = SCHEDULERS[scheduler](optimizer)
    used = []
    for step in range(6):
        used.append({"lr": float(group["lr"]), "momentum": group["momentum"]})
        train(model, optimizer, [step])
        if step < 5:
            schedule.step()
    assert len({options["lr"] for options in used}) == 6
    assert not as_tensor or group["lr"] is original

    model, by_hand = case.start()
    for step, options in enumerate(used):
        by_hand.param_groups[0].update(options)
        train(model, by_hand, [step])
    assert_same_bits(snapshot(optimizer), snapshot(by_hand))
