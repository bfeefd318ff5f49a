"""Construction and steps keep the conventions of `torch.optim`.

PyTorch tests its own optimizers with one description of each, an `OptimizerInfo`. The checks here and in
`test_torch_state_dicts.py` follow the same descriptions of ours.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo, OptimizerInput

from tests.optim.torch_infos import (
    DTYPES,
    INFOS,
    Problem,
    assert_same_state_dict,
    each_config,
    each_config_and_flag,
    each_info,
    needs_fused,
    started,
)

# ---- construction ----------------------------------------------------------------------------------------------------


@each_info
def test_the_descriptions_have_no_flags_that_choose_an_implementation(info: OptimizerInfo) -> None:
    for config in info.optim_inputs_func("cpu"):
        assert not {"foreach", "fused", "differentiable"} & config.kwargs.keys()


ERRORS = [(each, error) for each in INFOS for error in each.optim_error_inputs_func("cpu", torch.float32)]


@pytest.mark.parametrize("info, error", ERRORS, ids=[f"{i.name}-{e.optimizer_error_input.desc}" for i, e in ERRORS])
def test_mistakes_raise_what_other_optimizers_raise(info: OptimizerInfo, error: Any) -> None:
    given = error.optimizer_error_input
    params = Problem().params if given.params is None else given.params
    caught = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    with caught(error.error_type, match=error.error_regex):
        info.optim_cls(params, batch_size=4, **given.kwargs)


@each_config_and_flag
def test_an_optimizer_can_be_printed(pair: Any) -> None:
    _, optimizer = started(pair)
    text = repr(optimizer)
    assert text.startswith(f"{pair[0].name} (\nParameter Group 0\n")
    assert f"    lr: {optimizer.param_groups[0]['lr']}\n" in text


@each_info
@pytest.mark.parametrize("dims", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_lr_of_one_element_gives_the_steps_of_the_number(
    info: OptimizerInfo, dims: int, dtype: torch.dtype
) -> None:
    config = OptimizerInput(None, {})
    value = 0.0078125  # exact in every dtype
    expected, optimizer = started((info, config), lr=value)
    problem, tensor_optimizer = started((info, config), lr=torch.full((1,) * dims, value, dtype=dtype))
    problem.assert_equals(expected)
    for other in (optimizer, tensor_optimizer):
        for group in other.param_groups:
            group["lr"] *= 0.5
    problem.take_steps(tensor_optimizer, 2)
    expected.take_steps(optimizer, 2)
    problem.assert_equals(expected)
    assert tensor_optimizer.param_groups[0]["lr"].shape == (1,) * dims


# ---- steps -----------------------------------------------------------------------------------------------------------


@each_config_and_flag
@pytest.mark.parametrize("schedules", [None, 0, 1, 2], ids=["no schedule", "step", "linear", "plateau"])
def test_steps_go_downhill_or_uphill(pair: Any, schedules: int | None) -> None:
    problem = Problem()
    optimizer = problem.optimizer(pair)
    makers = [] if schedules is None else pair[0].scheduler_inputs[schedules]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a Tensor lr and a schedule that starts before the first step
        schedulers = [make(optimizer) for make in makers]
    first = problem.loss().item()
    for _ in range(20):
        loss = optimizer.step(problem.loss)
        for scheduler in schedulers:
            scheduler.step(loss.detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    last = problem.loss().item()
    if pair[1].desc.startswith("lr of 0"):
        assert last == first
    else:
        assert last > first if optimizer.param_groups[0]["maximize"] else last < first


@each_config_and_flag
def test_a_step_without_gradients_changes_nothing(pair: Any) -> None:
    problem = Problem()
    optimizer = problem.optimizer(pair)
    optimizer.step()
    problem.assert_equals(Problem())
    assert not optimizer.state
    problem.take_steps(optimizer, 2)
    before, state = problem.copy(), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    problem.assert_equals(before)
    assert_same_state_dict(optimizer.state_dict(), state)


@each_config_and_flag
def test_gradients_of_zero_move_no_weights(pair: Any) -> None:
    """Weight decay does, so it is switched off."""
    problem = Problem()
    optimizer = problem.optimizer(pair, weight_decay=0.0)
    for _ in range(3):
        for param in (problem.weight, problem.bias):
            param.grad = torch.zeros_like(param)
        optimizer.step()
    problem.assert_equals(Problem())


@each_config_and_flag
def test_a_step_returns_the_loss_of_its_closure(pair: Any) -> None:
    problem = Problem()
    optimizer = problem.optimizer(pair)
    assert optimizer.step() is None
    assert torch.equal(optimizer.step(problem.loss), Problem().loss())


@each_info
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_options_of_a_group_replace_those_of_the_constructor(info: OptimizerInfo, option: str) -> None:
    values = {"lr": 0.02, "weight_decay": 0.3}
    problem, whole = Problem(), Problem()
    groups = [{"params": [problem.weight], option: values[option]}, {"params": [problem.bias]}]
    optimizer = info.optim_cls(groups, batch_size=4)
    with_option = whole.optimizer((info, OptimizerInput(None, {})), **{option: values[option]})
    problem.take_steps(optimizer, 1)
    whole.take_steps(with_option, 1)
    assert torch.equal(problem.weight, whole.weight) and not torch.equal(problem.bias, whole.bias)


TOLERANCES = {
    # Sums are taken in another order, and over several steps.
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
    # Weights may be rounded to the other neighbour, once or twice: 2⁻¹⁰ and 2⁻⁷ away.
    torch.float16: {"rtol": 2**-9, "atol": 2**-11},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-8},
}


@each_config
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "flags",
    [{"foreach": True}, {"foreach": None}, pytest.param({"fused": True}, marks=needs_fused)],
    ids=["foreach", "default", "fused"],
)
def test_implementations_agree_with_the_loop(pair: Any, dtype: torch.dtype, flags: dict[str, Any]) -> None:
    factors = (
        {"factor_dtype": dtype if dtype == torch.float64 else torch.float32} if pair[0].name == "IFShampoo" else {}
    )
    problem, expected = Problem(dtype), Problem(dtype)
    optimizer = problem.optimizer(pair, **factors, **flags)
    loop = expected.optimizer(pair, **factors, fused=False, foreach=False)
    for _ in range(5):
        problem.loss()
        for param, other in zip((problem.weight, problem.bias), (expected.weight, expected.bias), strict=True):
            other.grad = param.grad.clone()  # so that differences do not grow through the gradients
        optimizer.step()
        loop.step()
    problem.assert_equals(expected, **TOLERANCES[dtype])
    for state, other in zip(optimizer.state.values(), loop.state.values(), strict=True):
        assert state.keys() == other.keys()
        assert all(state[name].dtype == other[name].dtype for name in state)


@each_config
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_fused
def test_a_fused_step_leaves_everything_as_it_is_if_gradients_overflow(pair: Any, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    optimizer = problem.optimizer(pair, fused=True)
    problem.take_steps(optimizer, 1)
    before, state = problem.copy(), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.found_inf = torch.ones(1)
    optimizer.grad_scale = torch.ones(1)
    problem.take_steps(optimizer, 1)
    problem.assert_equals(before)
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if name != "step" and "skipped" not in name:
                assert torch.equal(value, state[index][name]), name


@each_config
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_fused)], ids=["loop", "fused"])
def test_steps_with_a_gradient_scaler_are_those_without(pair: Any, fused: bool) -> None:
    problem, plain = Problem(), Problem()
    optimizer, expected = problem.optimizer(pair, fused=fused), plain.optimizer(pair, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for _ in range(4):
        problem.weight.grad = problem.bias.grad = None
        loss = (problem.x @ problem.weight.T + problem.bias).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    plain.take_steps(expected, 4)
    problem.assert_equals(plain)


@each_config_and_flag
def test_the_default_dtype_does_not_matter(pair: Any) -> None:
    expected, _ = started(pair)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        problem, optimizer = started(pair)
    finally:
        torch.set_default_dtype(before)
    problem.assert_equals(expected)
    assert all(state["step"].dtype == torch.int64 for state in optimizer.state.values())
