"""The optimizers keep the conventions of `torch.optim`.

PyTorch tests its own optimizers with one description of each, an `OptimizerInfo`. The checks here follow the same
descriptions of ours.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from tests.calls.cpu import needs_cpp
from tests.optim.checkpoints import through_file

FLAGS = ("foreach", "fused", "maximize", "capturable")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

COMMON_INPUTS = {
    "default": {},
    "lr": {"lr": 0.01},
    "Tensor lr": {"lr": torch.tensor(0.01)},
    "lr of 0": {"lr": 0.0},
    "weight decay": {"weight_decay": 0.1},
    "decoupled weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "capturable": {"weight_decay": 0.1, "capturable": True},
    "capturable, Tensor lr": {"lr": torch.tensor(0.01), "capturable": True},
    "no momentum": {"momentum": 0.0},
    "gamma of 0": {"gamma": 0.0},
}
SHAMPOO_INPUTS = {
    "T = 3": {"precondition_frequency": 3},
    "blocks": {"max_preconditioner_dim": 3},
    "elementwise": {"structure": "elementwise"},
    "recipe": dict(RECIPE),
}


def inputs(options: dict[str, dict[str, Any]]) -> Callable[..., list[OptimizerInput]]:
    return lambda device, dtype=None: [OptimizerInput(None, dict(kwargs), desc) for desc, kwargs in options.items()]


def info(optimizer: type[Optimizer], options: dict[str, dict[str, Any]]) -> OptimizerInfo:
    """Describe an optimizer to the checks."""
    return OptimizerInfo(
        optimizer,
        optim_inputs_func=inputs(options),
        scheduler_inputs=(
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
            [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4), lambda opt: ExponentialLR(opt, gamma=0.9)],
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10), ReduceLROnPlateau],
        ),
        supported_impls=("foreach", "fused"),
        not_og_supported_flags=FLAGS,
        has_capturable_arg=True,
        supports_complex=False,
        supports_fused_on=("cpu", "cuda"),
        optim_error_inputs_func=get_error_inputs_for_all_optims,
    )


INFOS = [info(RFRMSProp, COMMON_INPUTS), info(IFShampoo, {**COMMON_INPUTS, **SHAMPOO_INPUTS})]
CONFIGS = [(each, config) for each in INFOS for config in each.optim_inputs_func("cpu")]
ALL_CONFIGS = [
    (each, config) for each in INFOS for config in _get_optim_inputs_including_global_cliquey_kwargs("cpu", None, each)
]


def named(pair: tuple[OptimizerInfo, OptimizerInput]) -> str:
    flags = ",".join(flag for flag in ("foreach", "fused") if pair[1].kwargs.get(flag))
    return f"{pair[0].name}-{pair[1].desc}{'-' * bool(flags)}{flags}"


each_info = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
each_config = pytest.mark.parametrize("pair", CONFIGS, ids=named)
each_config_and_flag = pytest.mark.parametrize("pair", ALL_CONFIGS, ids=named)
needs_fused = needs_cpp


class Problem:
    """A small least-squares problem with a matrix and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float32, is_named: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        weight, bias, self.x = (
            torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((5, 4), (5,), (3, 4))
        )
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.is_named = is_named

    @property
    def params(self) -> list[Any]:
        both = [self.weight, self.bias]
        return list(zip(("weight", "bias"), both, strict=True)) if self.is_named else both

    def loss(self) -> Tensor:
        self.weight.grad = self.bias.grad = None
        value = (self.x @ self.weight.T + self.bias).square().mean()
        value.backward()
        return value

    def optimizer(self, pair: tuple[OptimizerInfo, OptimizerInput], **changes: Any) -> Optimizer:
        kwargs = copy.deepcopy({**pair[1].kwargs, **changes})
        return pair[0].optim_cls(self.params, **{"batch_size": 4, **kwargs})

    def take_steps(self, optimizer: Optimizer, steps: int) -> None:
        for _ in range(steps):
            self.loss()
            optimizer.step()

    def copy(self, is_named: bool = False) -> Problem:
        other = Problem(self.weight.dtype, is_named)
        other.weight.data.copy_(self.weight.data)
        other.bias.data.copy_(self.bias.data)
        return other

    def assert_equals(self, other: Problem, **tolerance: float) -> None:
        pairs = (self.weight, self.bias), (other.weight, other.bias)
        actual, expected = ([param.detach() for param in params] for params in pairs)
        torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0, "atol": 0}))


def started(pair: Any, steps: int = 3, is_named: bool = False, **changes: Any) -> tuple[Problem, Optimizer]:
    problem = Problem(is_named=is_named)
    optimizer = problem.optimizer(pair, **changes)
    problem.take_steps(optimizer, steps)
    return problem, optimizer


def assert_same_state_dict(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare whole state dicts, including the order and types of their entries."""
    assert list(actual) == list(expected)
    assert actual["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(actual["state"], expected["state"], rtol=0, atol=0)


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
    assert all(state["step"].dtype == torch.float32 for state in optimizer.state.values())


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
