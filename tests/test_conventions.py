"""What every torch optimizer does, and these three as well."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    CASES,
    OPTIONS,
    SHAPES,
    Case,
    Model,
    assert_same_bits,
    gradients,
    params_only,
    same_bits,
    snapshot,
    train,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from rootfree_kernels import IFShampoo, RFRMSProp, backends, eager

BEFORE, AFTER = range(3), range(3, 6)
"""The steps before and after what a test does to a run."""


def trained(case: Case, steps: Any = BEFORE, **changes: Any) -> tuple[Model, torch.optim.Optimizer]:
    model, optimizer = case.start(**changes)
    train(model, optimizer, steps)
    return model, optimizer


def results(case: Case, steps: Any = BEFORE, **changes: Any) -> dict[str, Tensor]:
    """All weights and state after some steps from a new start."""
    return snapshot(trained(case, steps, **changes)[1])


def set_gradients(params: list[Tensor], step: int) -> None:
    shapes = [tuple(param.shape) for param in params]
    for param, grad in zip(params, gradients(shapes, step, params[0].dtype), strict=True):
        param.grad = grad


# ---- parameters and groups -----------------------------------------------------------------------------------------


def test_named_parameters_step_as_unnamed_ones_and_keep_their_names(case: Case) -> None:
    model = Model(case.dtype)
    optimizer = case.make(model.named_parameters())
    train(model, optimizer, BEFORE)
    assert_same_bits(snapshot(optimizer), results(case))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(SHAPES)


GROUP_OPTIONS = {
    "lr": 0.02,
    "batch_size": 8,
    "beta2": 0.3,
    "momentum": 0.5,
    "damping": 0.5,
    "weight_decay": 0.0,
    "decoupled_weight_decay": True,
    "maximize": True,
}


@pytest.mark.parametrize("option", GROUP_OPTIONS)
def test_every_group_has_options_of_its_own(case: Case, option: str) -> None:
    """Each group steps as it does where all parameters have its options."""
    changed = {option: GROUP_OPTIONS[option]}
    model = Model(case.dtype)
    params = list(model.parameters())
    optimizer = case.make([{"params": params[:1]}, {"params": params[1:], **changed}])
    train(model, optimizer, BEFORE)
    mixed, default, everywhere = snapshot(optimizer), results(case), results(case, **changed)
    assert_same_bits(params_only(mixed, 0), params_only(default, 0))
    assert_same_bits(params_only(mixed, 1, 2, 3, 4), params_only(everywhere, 1, 2, 3, 4))
    assert not same_bits(mixed["1 weight"], default["1 weight"])


def test_group_options_may_change_between_steps(case: Case) -> None:
    model, optimizer = trained(case)
    optimizer.param_groups[0].update(lr=0.5, batch_size=8)
    train(model, optimizer, AFTER)
    assert not same_bits(snapshot(optimizer)["0 weight"], results(case, [*BEFORE, *AFTER])["0 weight"])

    model, late = case.start(lr=0.5, batch_size=8)
    late.param_groups[0].update({name: OPTIONS[name] for name in ("lr", "batch_size")})
    train(model, late, BEFORE)
    late.param_groups[0].update(lr=0.5, batch_size=8)
    train(model, late, AFTER)
    assert_same_bits(snapshot(late), snapshot(optimizer))


def test_a_group_added_between_steps_leaves_the_earlier_parameters_alone(case: Case) -> None:
    model = Model(case.dtype)
    params = list(model.parameters())
    optimizer = case.make(params[:3])
    train(model, optimizer, BEFORE)
    optimizer.add_param_group({"params": params[3:]})
    train(model, optimizer, AFTER)

    model = Model(case.dtype)
    alone = case.make(list(model.parameters())[:3])
    train(model, alone, [*BEFORE, *AFTER])
    assert_same_bits(params_only(snapshot(optimizer), 0, 1, 2), snapshot(alone))
    assert [int(optimizer.state[param]["step"]) for param in params] == [6, 6, 6, 3, 3]
    assert optimizer.param_groups[1]["batch_size"] == OPTIONS["batch_size"]


def test_parameters_without_a_gradient_wait(case: Case) -> None:
    """Each parameter steps as it does where no other one ever has a gradient."""
    shape, pattern = (7, 5), [(0, 1), (0,), (1,), (), (0, 1), (1,)]

    def run(only: set[int]) -> dict[str, Tensor]:
        params = [nn.Parameter(value) for value in gradients([shape, shape, (6,)], -1, case.dtype)]
        optimizer = case.make(params)
        for step, active in enumerate(pattern):
            set_gradients(params, step)
            for index, param in enumerate(params):
                if index not in only.intersection(active):
                    param.grad = None
            optimizer.step()
        return snapshot(optimizer)

    together = run({0, 1})
    assert_same_bits(params_only(together, 0), params_only(run({0}), 0))
    assert_same_bits(params_only(together, 1), params_only(run({1}), 1))
    assert (together["0 step"], together["1 step"]) == (3, 4)
    assert set(params_only(together, 2)) == {"2 weight"}  # no state before the first gradient


def test_a_step_without_any_gradient_changes_nothing(case: Case) -> None:
    model, optimizer = case.start()
    optimizer.step()
    assert not optimizer.state
    train(model, optimizer, BEFORE)
    before = snapshot(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (7, 0), (4, 0, 3, 3)], ids=str)
def test_zero_size_parameters_are_carried_along(case: Case, shape: tuple[int, ...]) -> None:
    def run(shapes: list[tuple[int, ...]]) -> torch.optim.Optimizer:
        params = [nn.Parameter(torch.ones(shape, dtype=case.dtype)) for shape in shapes]
        optimizer = case.make(params)
        for step in BEFORE:
            set_gradients(params, step)
            optimizer.step()
        return optimizer

    optimizer = run([(7, 5), (6,), shape])
    assert_same_bits(params_only(snapshot(optimizer), 0, 1), snapshot(run([(7, 5), (6,)])))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


# ---- the step: closure, modes, hooks, counts -----------------------------------------------------------------------


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


def test_gradients_are_left_untouched(case: Case) -> None:
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
    "default-device": lambda: torch.device("meta"),  # stands in for any other device
}


@pytest.mark.parametrize("mode", AMBIENT)
def test_modes_around_a_step_do_not_change_it(case: Case, mode: str) -> None:
    model, optimizer = case.start()
    for step in BEFORE:
        optimizer.zero_grad()
        model(step).backward()
        with AMBIENT[mode]():
            optimizer.step()
    assert_same_bits(snapshot(optimizer), results(case))


# ---- options of every optimizer ------------------------------------------------------------------------------------


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
    """Bit for bit, because the blocks are small; larger products may be summed in another order in a batch."""
    assert_same_bits(results(case, foreach=foreach), results(case, foreach=None))


def test_foreach_agrees_at_larger_sizes(case: Case) -> None:
    """In FP64, where a different order of summation over 64 terms shows at 1e-16 · 64 and no rounding mode acts."""
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


def test_fused_true_says_why_it_cannot_be_served(case: Case) -> None:
    """Kernels compute in FP32."""
    model = Model(torch.float64)
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


# ---- learning rate schedules ---------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=6),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=6),  # and the momentum
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_schedulers_set_what_the_next_step_uses(case: Case, scheduler: str, as_tensor: bool) -> None:
    """The same run as with lr and momentum put in by hand."""
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


# ---- GradScaler ----------------------------------------------------------------------------------------------------

SCALE = 2.0**12  # a power of two: scaling and unscaling are exact


def scaled_step(model: Model, optimizer: torch.optim.Optimizer, scaler: Any, step: int) -> None:
    optimizer.zero_grad()
    scaler.scale(model(step)).backward()
    scaler.step(optimizer)
    scaler.update()


def test_grad_scaler_keeps_the_result(case: Case) -> None:
    model, optimizer = case.start()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in BEFORE:
        scaled_step(model, optimizer, scaler, step)
    assert_same_bits(snapshot(optimizer), results(case))


def test_grad_scaler_with_unscale_and_clipping_keeps_the_result(case: Case) -> None:
    model, optimizer = case.start()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    plain_model, plain = case.start()
    for step in BEFORE:
        optimizer.zero_grad()
        scaler.scale(model(step)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

        plain.zero_grad()
        plain_model(step).backward()
        assert nn.utils.clip_grad_norm_(plain_model.parameters(), 1.0) == norm > 1
        plain.step()
    assert_same_bits(snapshot(optimizer), snapshot(plain))


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale-step"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("steps_before", [3, 4], ids=["update-step", "other-step"])
def test_an_overflow_under_grad_scaler_is_counted_and_changes_nothing_else(
    case: Case, unscale: bool, bad: float, steps_before: int
) -> None:
    """Every parameter is skipped, not only the one whose gradient overflowed."""
    model, optimizer = trained(case, range(steps_before))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    before = snapshot(optimizer)
    optimizer.zero_grad()
    scaler.scale(model(steps_before)).backward()
    model.bias.grad[0] = bad
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()

    after = snapshot(optimizer)
    for name in before:
        if "skipped" in name or "step" in name:
            assert torch.equal(after[name], before[name] + 1), name
        else:
            assert same_bits(after[name], before[name]), name
    assert scaler.get_scale() == SCALE / 2

    scaled_step(model, optimizer, scaler, steps_before)
    finite = snapshot(optimizer)
    assert all(value.isfinite().all() for value in finite.values())
    assert not any(same_bits(finite[name], before[name]) for name in before if "momentum_buffer" in name)
    assert all(torch.equal(finite[name], after[name]) for name in after if "skipped" in name)


# ---- strides and dtypes --------------------------------------------------------------------------------------------


def sliced(x: Tensor) -> Tensor:
    """`x` inside a larger tensor, from an offset on, with gaps along every axis."""
    whole = torch.zeros([2 * size + 3 for size in x.shape], dtype=x.dtype)
    view = whole[tuple(slice(1, 1 + 2 * size, 2) for size in x.shape)]
    return view.copy_(x)


def permuted(x: Tensor) -> Tensor:
    """`x` with its axes in the opposite order in memory."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


LAYOUTS = [
    pytest.param((7, 5), permuted, id="matrix-transposed"),
    pytest.param((7, 5), sliced, id="matrix-sliced"),
    pytest.param((6,), sliced, id="vector-strided"),
    pytest.param((4, 3, 2, 2), channels_last, id="conv-channels_last"),
    pytest.param((4, 3, 2, 2), permuted, id="conv-permuted"),
    pytest.param((4, 3, 2, 2), sliced, id="conv-sliced"),
]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_parameters_of_any_strides_step_as_contiguous_ones(case: Case, shape: Any, layout: Any) -> None:
    """Also through a checkpoint; and the memory between the numbers of a parameter stays as it is."""
    finals, states = [], []
    for arrange in (layout, torch.clone):
        (value,) = gradients([shape], -1, case.dtype)
        param = nn.Parameter(arrange(value))
        strides = param.stride()
        optimizer = case.make([param])
        for step in [*BEFORE, *AFTER]:
            (grad,) = gradients([shape], step, case.dtype)
            param.grad = arrange(grad)
            optimizer.step()
            if step == BEFORE[-1]:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert param.stride() == strides
        finals.append(param)
        states.append(snapshot(optimizer))
    assert finals[0].stride() != finals[1].stride()
    assert_same_bits(*states)
    memory = torch.tensor([], dtype=case.dtype).set_(finals[0].untyped_storage())
    assert memory.count_nonzero() == finals[0].count_nonzero()  # the gaps hold zeros still


GRADIENT_LAYOUTS = [
    pytest.param((7, 5), permuted, id="matrix-transposed"),
    pytest.param((7, 5), sliced, id="matrix-sliced"),
    pytest.param((7, 5), lambda x: x[:1].expand(7, 5), id="matrix-expanded"),
    pytest.param((6,), sliced, id="vector-strided"),
    pytest.param((6,), lambda x: x[:1].expand(6), id="vector-expanded"),
    pytest.param((4, 3, 2, 2), channels_last, id="conv-channels_last"),
    pytest.param((4, 3, 2, 2), lambda x: x[:, :1].expand(4, 3, 2, 2), id="conv-expanded"),
]


@pytest.mark.parametrize(("shape", "layout"), GRADIENT_LAYOUTS)
def test_gradients_of_any_strides_act_as_contiguous_ones(case: Case, shape: Any, layout: Any) -> None:
    states = []
    for arrange in (layout, lambda x: layout(x).contiguous()):
        param = nn.Parameter(torch.ones(shape, dtype=case.dtype))
        optimizer = case.make([param])
        for step in BEFORE:
            param.grad = arrange(gradients([shape], step, case.dtype)[0])
            optimizer.step()
        states.append(snapshot(optimizer))
    assert_same_bits(*states)


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_floating_dtype_of_weights_is_served(case: Case, dtype: torch.dtype) -> None:
    """The trajectory of FP64 weights but for seven roundings of the weight, at the start and after each of six
    steps, of at most one unit in the last place (eps · |w|) each; one more for those of the gradients."""

    def run(dtype: torch.dtype) -> Tensor:
        changes = {"factor_dtype": torch.float64, "state_dtype": torch.float64} if case.is_shampoo else {}
        model = Model(dtype)
        optimizer = case.make(model.parameters(), lr=0.25, **changes)
        train(model, optimizer, [*BEFORE, *AFTER])
        assert all(param.dtype == dtype for param in model.parameters())
        return nn.utils.parameters_to_vector(model.parameters()).detach().double()

    actual, expected = run(dtype), run(torch.float64)
    tolerance = 0.0 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= tolerance
    start = nn.utils.parameters_to_vector(Model(torch.float64).parameters())
    assert (start - expected).abs().max() > 5 * tolerance


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_gradient_may_have_another_floating_dtype(case: Case, grad_dtype: torch.dtype) -> None:
    """As after a reduction of gradients in another precision; no cast rounds the numbers chosen here."""
    states = []
    for dtype in (grad_dtype, case.dtype):
        params = [nn.Parameter(torch.ones(shape, dtype=case.dtype)) for shape in SHAPES.values()]
        optimizer = case.make(params)
        for step in BEFORE:
            for param, grad in zip(params, gradients(SHAPES.values(), step, torch.bfloat16), strict=True):
                param.grad_dtype = None
                param.grad = grad.to(dtype)
            optimizer.step()
        states.append(snapshot(optimizer))
    if grad_dtype == torch.float64:  # the diagonal step then divides in FP64 and rounds to FP32 afterwards
        torch.testing.assert_close(*states, rtol=2**-20, atol=2**-20)
    else:
        assert_same_bits(*states)


# ---- state ---------------------------------------------------------------------------------------------------------


def shapes_and_dtypes(state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in state.items()}


COUNTS = {"step": ((), torch.float32)}


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2, 2), (6,), ()], ids=str)
def test_state_of_the_diagonal_optimizers(shape: tuple[int, ...]) -> None:
    for case in CASES[:2]:
        param = nn.Parameter(torch.ones(shape))
        optimizer = case.make([param])
        set_gradients([param], 0)
        optimizer.step()
        assert shapes_and_dtypes(optimizer.state[param]) == COUNTS | {
            "square": (shape, torch.float32),
            "momentum_buffer": (shape, torch.float32),
            "skipped": ((), torch.int32),
        }


def test_state_of_compensated_and_half_precision_diagonal_runs() -> None:
    param = nn.Parameter(torch.ones(6, dtype=torch.bfloat16))
    compensated = {"rounding": "compensated", "weight_rounding": "compensated"}
    optimizer = RFRMSProp([param], **OPTIONS, state_dtype=torch.bfloat16, **compensated)
    set_gradients([param], 0)
    optimizer.step()
    assert shapes_and_dtypes(optimizer.state[param]) == COUNTS | {
        "square": ((6,), torch.bfloat16),
        "square_residual": ((6,), torch.int16),
        "momentum_buffer": ((6,), torch.bfloat16),
        "weight_residual": ((6,), torch.int16),
        "skipped": ((), torch.int32),
    }


def test_state_of_a_matrix() -> None:
    param = nn.Parameter(torch.ones(7, 5))
    optimizer = IFShampoo([param], **OPTIONS)
    set_gradients([param], 0)
    optimizer.step()
    assert shapes_and_dtypes(optimizer.state[param]) == COUNTS | {
        "momentum_buffer": ((7, 5), torch.float32),
        "factor_c": ((1, 7, 7), torch.bfloat16),
        "factor_k": ((1, 5, 5), torch.bfloat16),
        "momentum_c": ((1, 7, 7), torch.bfloat16),
        "momentum_k": ((1, 5, 5), torch.bfloat16),
        "skipped": ((1,), torch.int32),
    }


def test_state_of_a_matrix_of_several_tiles_with_residuals() -> None:
    param = nn.Parameter(torch.ones(7, 5, dtype=torch.bfloat16))
    compensated = {"rounding": "compensated", "weight_rounding": "compensated"}
    optimizer = IFShampoo([param], **OPTIONS, max_preconditioner_dim=3, **compensated)
    set_gradients([param], 0)
    optimizer.step()
    expected: dict[str, Any] = dict(COUNTS)
    expected["momentum_buffer"] = ((7, 5), torch.float32)
    expected["weight_residual"] = ((7, 5), torch.int16)
    tiles = {"": (1, 3, 3), ".1": (1, 3, 2), ".2": (2, 2, 3), ".3": (2, 2, 2)}
    for suffix, (count, rows, cols) in tiles.items():
        for side, size in (("c", rows), ("k", cols)):
            expected[f"factor_{side}{suffix}"] = ((count, size, size), torch.bfloat16)
            expected[f"momentum_{side}{suffix}"] = ((count, size, size), torch.bfloat16)
            expected[f"residual_{side}{suffix}"] = ((count, size, size), torch.int16)
        expected[f"skipped{suffix}"] = ((count,), torch.int32)
    assert shapes_and_dtypes(optimizer.state[param]) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_momentum_is_kept_in_fp32_or_better_unless_told_otherwise(case: Case, dtype: torch.dtype) -> None:
    for chosen in (None, torch.bfloat16, torch.float32):
        model = Model(dtype)
        optimizer = case.make(model.parameters(), state_dtype=chosen)
        train(model, optimizer, [0])
        expected = chosen or (torch.float64 if dtype == torch.float64 else torch.float32)
        assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {expected}
        squares = {state["square"].dtype for state in optimizer.state.values() if "square" in state}
        assert squares == {expected}


# ---- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_steps_identically_and_independently(case: Case, duplicate: Any) -> None:
    model, optimizer = trained(case)
    optimizer.zero_grad()
    other_model, other = duplicate((model, optimizer))
    assert_same_bits(snapshot(other), snapshot(optimizer))
    before = snapshot(optimizer)
    train(other_model, other, AFTER)
    assert_same_bits(snapshot(optimizer), before)
    train(model, optimizer, AFTER)
    assert_same_bits(snapshot(optimizer), snapshot(other))
    assert_same_bits(snapshot(other), results(case, [*BEFORE, *AFTER]))


# ---- no waiting for the device -------------------------------------------------------------------------------------

READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__index__", "__bool__", "nonzero")


class NoReads(TorchDispatchMode):
    """Fails where the host asks for a number that a tensor holds."""

    TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        size_is_told = kwargs.get("output_size") is not None
        assert size_is_told or self.TAGS.isdisjoint(func.tags), f"{func} waits for the device"
        return func(*args, **kwargs)


@contextmanager
def no_reads() -> Iterator[None]:
    """Any read of a tensor's value by the host fails, within the operators (which hide from a mode) as well."""

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the host reads a tensor")

    def watched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            with NoReads():
                return function(*args)

        return call

    functions = {name: watched(f) for name, f in vars(eager).items() if inspect.isfunction(f)}
    with pytest.MonkeyPatch.context() as patch, NoReads():
        patch.setitem(backends.BACKENDS, "eager", SimpleNamespace(**functions))
        for name in READS:
            patch.setattr(torch.Tensor, name, forbidden)
        yield


@pytest.mark.parametrize("capturable", [False, True], ids=["default", "capturable"])
@pytest.mark.parametrize("case", [case for case in CASES if "T3" not in case.name], ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["", "eager"], ids=["best backend", "eager"])
def test_a_step_with_t_1_reads_no_tensor(
    case: Case, capturable: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOTFREE_BACKEND", backend)
    model, optimizer = case.start(lr=torch.tensor(0.01), capturable=capturable)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for step in BEFORE:
        model(step).backward()
        with no_reads():
            optimizer.step()


READERS = {
    "float": float,
    "bool": bool,
    "item": lambda x: x.item(),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "repeat": lambda x: torch.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("reader", READERS)
def test_reading_a_tensor_is_noticed(reader: str) -> None:
    """So that the test above can fail."""
    x, noticed = torch.ones(1), False
    with no_reads():
        try:
            READERS[reader](x)
        except AssertionError:
            noticed = True
    assert noticed


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01])], ids=["0-d", "1-d"])
def test_the_learning_rate_is_never_read(case: Case, lr: Tensor) -> None:
    """Also where T > 1, whose step counts the host does read."""
    model, optimizer = case.start(lr=lr)

    def guarded(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert self.data_ptr() != lr.data_ptr(), f"{name} of the learning rate"
            return original(self, *args, **kwargs)

        return read

    for step in BEFORE:
        model(step).backward()
        with pytest.MonkeyPatch.context() as patch:
            for name in READS:
                patch.setattr(torch.Tensor, name, guarded(name))
            optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("capturable", [False, True], ids=["default", "capturable"])
@pytest.mark.parametrize("case", [case for case in CASES if "T3" not in case.name], ids=lambda case: case.name)
def test_a_step_with_t_1_never_waits_for_the_gpu(case: Case, capturable: bool) -> None:
    """The first step sets up state and may wait."""
    model = Model(case.dtype).cuda()
    params = list(model.parameters())
    optimizer = case.make(params, lr=torch.tensor(0.01, device="cuda"), capturable=capturable)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_group_without_parameters_is_served(case: Case) -> None:
    model, expected = case.start()
    train(model, expected, [0, 1])
    model = Model(case.dtype)
    optimizer = case.make([{"params": []}, {"params": list(model.parameters())}])
    train(model, optimizer, [0, 1])
    assert_same_bits(snapshot(optimizer), snapshot(expected))
