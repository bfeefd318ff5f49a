"""Bad input: an error that names the argument, the value and the remedy, before anything changes; and non-finite
gradients, which are skipped, counted and survived."""

from __future__ import annotations

import copy
import inspect
import math
import re
from typing import Any

import pytest
import reference as ref
import torch
from conftest import CASES, OPTIONS, SHAPES, Case, Model, assert_same_bits, same_bits, snapshot, train
from torch import Tensor, nn

from rootfree_kernels import GrowingInterval, IFShampoo, RFAdaGrad, RFRMSProp

OPTIMIZERS = (RFRMSProp, RFAdaGrad, IFShampoo)
OPTIONS_OF_ALL = set(inspect.signature(RFRMSProp).parameters)

BELOW_ZERO = (-0.1, -math.inf, math.inf, math.nan, "0.1", None, [0.1])
NOT_BELOW_ONE = (1.0, 1, 1.5)
NOT_FLAGS = (1, 0, "yes", 0.0)
BAD_VALUES = {
    "lr": (*BELOW_ZERO, True, torch.ones(2), torch.tensor(1)),
    "batch_size": (*BELOW_ZERO, 0, 0.0, -1, True),
    "beta2": (*BELOW_ZERO, True),
    "damping": BELOW_ZERO,
    "weight_decay": BELOW_ZERO,
    "momentum": (*BELOW_ZERO, *NOT_BELOW_ONE),
    "riemannian_momentum": (*BELOW_ZERO, *NOT_BELOW_ONE),
    "gamma": (0.5, -1, math.nan, None),
    "precondition_frequency": (0, -1, 1.5, 2.0, True, None, "2"),
    "clip": ("spectral", None, 1.0),
    "structure": ("diagonal", None),
    "max_preconditioner_dim": (0, -1, 2.5, True),
    "factor_dtype": (torch.float16, torch.int8, None, "bfloat16"),
    "matmul_dtype": (torch.float16, "bfloat16"),
    "state_dtype": (torch.float16, torch.int16, "float32"),
    "rounding": ("up", None, True),
    "weight_rounding": ("up", None, True),
    "seed": (0.5, None, "0"),
    "cache_products": NOT_FLAGS,
    "packed_momentum": (*NOT_FLAGS, None),
    "decoupled_weight_decay": (*NOT_FLAGS, None),
    "maximize": (*NOT_FLAGS, None),
    "capturable": (*NOT_FLAGS, None),
    "foreach": NOT_FLAGS,
    "fused": NOT_FLAGS,
}
BAD_OPTIONS = [
    pytest.param(optimizer, name, value, id=f"{optimizer.__name__}-{name}={value!r}".replace("\n", ""))
    for optimizer in OPTIMIZERS
    for name, values in BAD_VALUES.items()
    for value in values
    if name in OPTIONS_OF_ALL or optimizer is IFShampoo
]


def assert_explains(error: Exception, name: str, value: Any) -> None:
    message = str(error)
    assert name in message
    assert repr(value) in message
    assert re.search(r"\b(pass|choose) \w+", message), f"no remedy in {message!r}"


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "name", "value"), BAD_OPTIONS)
def test_a_bad_option_is_refused_wherever_it_is_given(optimizer: Any, name: str, value: Any) -> None:
    """To the constructor, to a new group, and to an existing group between two steps."""
    with pytest.raises(ValueError) as caught:
        optimizer(Model().parameters(), **{**OPTIONS, name: value})
    assert_explains(caught.value, name, value)

    model = Model()
    params = list(model.parameters())
    opt = optimizer([{"params": params[:2]}, {"params": params[2:4]}], **OPTIONS)
    train(model, opt, [0, 1])
    before, groups = snapshot(opt), copy.copy(opt.param_groups)
    with pytest.raises(ValueError) as caught:
        opt.add_param_group({"params": params[4:], name: value})
    assert_explains(caught.value, name, value)
    assert opt.param_groups == groups

    right = opt.param_groups[1][name]
    opt.param_groups[1][name] = value  # the first group is in order, and must not be stepped either
    with pytest.raises(ValueError) as caught:
        opt.step()
    assert_explains(caught.value, name, value)
    assert_same_bits(snapshot(opt), before)

    opt.param_groups[1][name] = right
    opt.step()
    assert not same_bits(snapshot(opt)["2 momentum_buffer"], before["2 momentum_buffer"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_batch_size_has_no_default(optimizer: Any) -> None:
    with pytest.raises(ValueError, match=r"batch_size.*pass the number of terms"):
        optimizer(Model().parameters(), lr=0.01)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_foreach_and_fused_exclude_each_other(optimizer: Any) -> None:
    with pytest.raises(ValueError, match=r"foreach=True and fused=True: choose"):
        optimizer(Model().parameters(), **OPTIONS, foreach=True, fused=True)


@pytest.mark.parametrize("frequency", [2, GrowingInterval(4)], ids=repr)
def test_capturable_needs_an_update_at_every_step(frequency: Any) -> None:
    with pytest.raises(ValueError, match=r"precondition_frequency=.* capturable=True.*pass") as caught:
        IFShampoo(Model().parameters(), **OPTIONS, capturable=True, precondition_frequency=frequency)
    assert repr(frequency) in str(caught.value)


@pytest.mark.parametrize("max_interval", [0, -1, 1.5, math.nan, None], ids=repr)
def test_growing_interval_wants_a_whole_number(max_interval: Any) -> None:
    with pytest.raises(ValueError) as caught:
        GrowingInterval(max_interval)
    assert_explains(caught.value, "max_interval", max_interval)


LAYOUT_OPTIONS = {
    "factor_dtype": torch.float64,
    "rounding": "compensated",
    "weight_rounding": "compensated",
    "structure": "elementwise",
    "max_preconditioner_dim": 3,
    "packed_momentum": True,
    "state_dtype": torch.float64,
}


@pytest.mark.parametrize("name", LAYOUT_OPTIONS)
def test_an_option_that_the_state_was_made_for_cannot_be_changed(name: str) -> None:
    """Neither an error half way nor a run that goes on as if nothing had been asked for."""
    params = list(Model(torch.bfloat16).parameters())
    opt = IFShampoo([{"params": params[:1]}, {"params": params[1:]}], **OPTIONS)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    before = snapshot(opt)
    opt.param_groups[1][name] = LAYOUT_OPTIONS[name]
    with pytest.raises(ValueError, match=rf"{name}='?{LAYOUT_OPTIONS[name]}\b.* before the first step"):
        opt.step()
    assert_same_bits(snapshot(opt), before)


# ---- parameters ----------------------------------------------------------------------------------------------------

BAD_PARAMETERS = {
    "integer": (lambda: torch.ones(3, 4, dtype=torch.int64), ValueError, "torch.int64"),
    "boolean": (lambda: torch.ones(3, 4, dtype=torch.bool), ValueError, "torch.bool"),
    "complex": (lambda: torch.ones(3, 4, dtype=torch.complex64), ValueError, "torch.complex64"),
    "float8": (lambda: torch.ones(3, 4).to(torch.float8_e4m3fn), ValueError, "torch.float8_e4m3fn"),
    "sparse": (lambda: torch.eye(4).to_sparse(), ValueError, "torch.sparse_coo"),
    "number": (lambda: 1.0, TypeError, "float"),
    "string": (lambda: "weight", TypeError, "str"),
    "list": (lambda: [torch.ones(3, 4)], TypeError, "list"),
    "not-a-leaf": (lambda: torch.ones(3, 4, requires_grad=True) * 2, ValueError, "non-leaf"),
}


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_parameter_is_refused(optimizer: Any, kind: str) -> None:
    make, error, word = BAD_PARAMETERS[kind]
    good = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(error, match=word):
        optimizer([good, make()], **OPTIONS)

    opt = optimizer([good], **OPTIONS)
    groups = copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(error, match=word):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2)), make()]})
    assert opt.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_named_parameter_is_named(optimizer: Any) -> None:
    named = [("good", nn.Parameter(torch.ones(3))), ("encoder.index", torch.ones(3, dtype=torch.int32))]
    with pytest.raises(ValueError, match=r"encoder\.index.*torch\.int32.*pass"):
        optimizer(named, **OPTIONS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_duplicate_parameters_are_refused(optimizer: Any) -> None:
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match=r"params\[2\].*twice.*once"):
        optimizer([first, second, first], **OPTIONS)
    with pytest.raises(ValueError, match="more than one"):
        optimizer([{"params": [first, second]}, {"params": [first]}], **OPTIONS)
    opt = optimizer([first], **OPTIONS)
    with pytest.raises(ValueError, match="more than one"):
        opt.add_param_group({"params": [second, first]})
    assert [group["params"] for group in opt.param_groups] == [[first]]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("params", [[], {}], ids=["list", "dict"])
def test_no_parameters_at_all_are_refused(optimizer: Any, params: Any) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        optimizer(params, **OPTIONS)


def test_a_group_that_is_no_dict_is_refused(case: Case) -> None:
    _, optimizer = case.start()
    with pytest.raises(TypeError, match="dict"):
        optimizer.add_param_group([nn.Parameter(torch.ones(3))])


def test_a_set_of_parameters_is_refused(case: Case) -> None:
    """Its order, by which random bits and checkpoints go, changes from run to run."""
    with pytest.raises(TypeError, match="set"):
        case.make([{"params": {nn.Parameter(torch.ones(3))}}])


# ---- gradients -----------------------------------------------------------------------------------------------------


def sparse_gradient(param: nn.Parameter) -> None:
    param.grad = torch.ones_like(param).to_sparse()


def complex_gradient(param: nn.Parameter) -> None:
    param.grad, param.grad_dtype = None, None
    param.grad = torch.ones(param.shape, dtype=torch.complex64)


def integer_gradient(param: nn.Parameter) -> None:
    param.grad, param.grad_dtype = None, None
    param.grad = torch.ones(param.shape, dtype=torch.int32)


def gradient_of_another_shape(param: nn.Parameter) -> None:
    """As after a vocabulary was resized. (A gradient on another device PyTorch itself refuses.)"""
    param.grad.data = torch.ones(3)


BAD_GRADIENTS = {
    "sparse": (sparse_gradient, r"sparse_coo.*dense"),
    "complex": (complex_gradient, r"complex64.*pass"),
    "integer": (integer_gradient, r"int32.*pass"),
    "shape": (gradient_of_another_shape, r"\(3,\)"),
}


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.parametrize("target", ["conv", "bias", "scale"])
def test_a_bad_gradient_is_refused_before_anything_changes(case: Case, kind: str, target: str) -> None:
    """The group before the one with the bad gradient is not stepped either."""
    spoil, message = BAD_GRADIENTS[kind]
    model = Model(case.dtype)
    params = list(model.parameters())
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:]}])
    for steps in ((), (0, 1)):  # without state and with it
        train(model, optimizer, steps)
        before = snapshot(optimizer)
        model(2).backward()
        spoil(getattr(model, target))
        with pytest.raises((RuntimeError, ValueError), match=message):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)


def test_a_sparse_embedding_is_refused_with_the_remedy(case: Case) -> None:
    embedding = nn.Embedding(6, 4, sparse=True, dtype=case.dtype)
    optimizer = case.make(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse=False"):
        optimizer.step()
    assert not optimizer.state


# ---- state dicts ---------------------------------------------------------------------------------------------------


def other_classes(case: Case) -> dict[str, torch.optim.Optimizer]:
    """Optimizers over the parameters of a `Model`, none of which keeps the state of the case's."""
    own = RFRMSProp if case.is_shampoo else IFShampoo
    common = {"lr": OPTIONS["lr"]}
    return {
        "ours": own(Model(case.dtype).parameters(), **OPTIONS),
        "AdamW": torch.optim.AdamW(Model(case.dtype).parameters(), **common),
        "SGD": torch.optim.SGD(Model(case.dtype).parameters(), **common),
    }


def assert_refused(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], match: str) -> None:
    """Loading raises ValueError and leaves options, weights and state as they were."""
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state_dict)
    assert_same_bits(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("stepped", [True, False], ids=["stepped", "new"])
@pytest.mark.parametrize("other", ["ours", "AdamW", "SGD"])
def test_a_state_dict_of_another_class_is_refused(case: Case, other: str, stepped: bool) -> None:
    model, optimizer = case.start()
    train(model, optimizer, [0, 1])
    stranger = other_classes(case)[other]
    if stepped:
        for param in stranger.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        stranger.step()
    assert_refused(optimizer, stranger.state_dict(), match=type(optimizer).__name__)


@pytest.mark.parametrize("target", SHAPES)
def test_a_state_dict_of_other_shapes_is_refused(case: Case, target: str) -> None:
    model, optimizer = case.start()
    train(model, optimizer, [0, 1])
    params = [
        nn.Parameter(torch.ones((2, *shape) if name == target else shape, dtype=case.dtype))
        for name, shape in SHAPES.items()
    ]
    stranger = case.make(params)
    for param in params:
        param.grad = torch.ones_like(param)
    stranger.step()
    assert_refused(optimizer, stranger.state_dict(), match=r"state_dict has .* load one")


def test_a_state_dict_of_other_groups_is_refused(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, [0, 1])
    params = list(Model(case.dtype).parameters())
    split = case.make([{"params": params[:2]}, {"params": params[2:]}])
    assert_refused(optimizer, split.state_dict(), match="groups")
    assert_refused(optimizer, case.make(params[1:]).state_dict(), match="groups")


@pytest.mark.parametrize("entry", ["step", "momentum_buffer", "skipped"])
def test_a_state_dict_that_lacks_an_entry_or_has_one_too_many_is_refused(case: Case, entry: str) -> None:
    model, optimizer = case.start()
    train(model, optimizer, [0, 1])
    index = list(SHAPES).index("bias")
    for change in (lambda state: state.pop(entry), lambda state: state.update(exp_avg=torch.ones(6))):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved["state"][index])
        assert_refused(optimizer, saved, match=r"state_dict has .* load one")


@pytest.mark.parametrize("optimizer", [RFRMSProp, IFShampoo])
@pytest.mark.parametrize("beta2", [0.999999, 1, 1.5])
def test_beta2_of_1_or_more_is_refused_where_the_average_would_turn_negative(optimizer: Any, beta2: float) -> None:
    params = list(Model().parameters())
    if beta2 < 1:
        optimizer(params, **OPTIONS, beta2=beta2)
    else:
        with pytest.raises(ValueError, match=rf"beta2={beta2}: pass a number below 1"):
            optimizer(params, **OPTIONS, beta2=beta2)


def test_a_sum_may_take_the_curvature_whole() -> None:
    optimizer = RFAdaGrad(Model().parameters(), **OPTIONS, beta2=1.5)
    assert optimizer.param_groups[0]["gamma"] == 0.0


def test_a_state_dict_of_a_model_is_refused(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, range(1))
    assert_refused(optimizer, model.state_dict(), match="not of a model")


def test_fused_is_refused_when_the_optimizer_is_made(case: Case) -> None:
    model = Model(torch.float64)
    with pytest.raises(
        RuntimeError, match=r"fused=True .* cpp: its arithmetic is FP32.* eager: it has no fused kernels"
    ):
        case.make(model.parameters(), fused=True)


def test_a_bad_gradient_names_its_parameter(case: Case) -> None:
    model = Model(case.dtype)
    optimizer = case.make(model.named_parameters())
    model.weight.grad = torch.ones_like(model.weight).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 'weight'"):
        optimizer.step()


@pytest.mark.parametrize("optimizer", [RFRMSProp, IFShampoo])
def test_a_dtype_for_which_the_state_was_not_made_is_refused_before_anything_changes(optimizer: Any) -> None:
    model = Model()
    opt = optimizer(model.parameters(), **OPTIONS, weight_rounding="compensated")
    train(model, opt, range(2))
    model.to(torch.bfloat16)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"torch.bfloat16 on cpu .* before the first step"):
        opt.step()
    assert_same_bits(snapshot(opt), before)


# ---- backends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "triton", "no-such-backend"])
def test_a_forced_backend_that_cannot_run_says_why(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of them runs on a CPU (Triton does in these tests, which interpret its kernels)."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, optimizer = case.start()
    for steps in ((), (0, 1)):  # without state and with it
        monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)
        train(model, optimizer, steps)
        model(2).backward()
        before = snapshot(optimizer)
        monkeypatch.setenv("ROOTFREE_BACKEND", backend)
        with pytest.raises(RuntimeError, match=rf"ROOTFREE_BACKEND={backend}.*(not run on cpu|choose one of)"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)


def test_the_eager_backend_can_be_forced(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = case.start()
    monkeypatch.setenv("ROOTFREE_BACKEND", "eager")
    train(model, optimizer, [0, 1])
    monkeypatch.delenv("ROOTFREE_BACKEND")
    model, expected = case.start(fused=False)
    train(model, expected, [0, 1])
    assert_same_bits(snapshot(optimizer), snapshot(expected))


# ---- non-finite gradients ------------------------------------------------------------------------------------------

HUGE = 3e38  # finite in FP32 and BF16, and no product with it is
NON_FINITE = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, HUGE], ids=str)
SHAMPOOS = pytest.mark.parametrize("case", CASES[2:], ids=lambda case: case.name)
ROW, COL = 6, 4  # the last element of `weight`, parameter 0


def initial_state(case: Case) -> dict[str, Tensor]:
    """What a first step finds: a step that is left out makes it (see the test of the first gradient)."""
    model, optimizer = case.start()
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    return snapshot(optimizer)


def runs_with_and_without(case: Case, steps_before: int, param: str, index: Any, bad: float) -> tuple:
    """Snapshots before one more step, after it with a bad number in one gradient, and after it with none; and the
    model and the optimizer that met the bad number."""
    model, optimizer = case.start()
    train(model, optimizer, range(steps_before))
    before = snapshot(optimizer) if steps_before else initial_state(case)
    clean_model, clean = copy.deepcopy((model, optimizer))
    train(clean_model, clean, [steps_before])
    optimizer.zero_grad()
    model(steps_before).backward()
    getattr(model, param).grad[index] = bad
    optimizer.step()
    return before, snapshot(optimizer), snapshot(clean), model, optimizer


def assert_recovers(model: Model, optimizer: torch.optim.Optimizer, steps: range, buffer: Tensor) -> None:
    """Finite gradients go on from there with finite values, move `buffer`, and are not counted as skipped."""
    skips = {name: value for name, value in snapshot(optimizer).items() if "skipped" in name}
    old = buffer.clone()
    train(model, optimizer, steps)
    after = snapshot(optimizer)
    assert all(value.isfinite().all() for value in after.values())
    assert_same_bits({name: after[name] for name in skips}, skips)
    assert (buffer != old).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, HUGE], ids=str)
def test_the_first_gradient_may_be_non_finite(case: Case, bad: float) -> None:
    """Weights and state are then those of the start, but for the counts."""
    model, optimizer = case.start()
    start = snapshot(optimizer)
    model(0).backward()
    for param in model.parameters():
        param.grad.fill_(bad)
    optimizer.step()
    after = snapshot(optimizer)
    assert_same_bits({name: after[name] for name in start}, start)
    for name in after.keys() - start.keys():
        value, entry = after[name], name.split()[1].split(".")[0]
        if entry in ("factor_c", "factor_k"):
            assert torch.equal(value, torch.eye(value.shape[-1]).to(value.dtype).expand_as(value)), name
        else:
            assert (value == (1 if entry in ("square", "step", "skipped") else 0)).all(), name


BLOCK_ENTRIES = ("factor_c", "factor_k", "momentum_c", "momentum_k", "residual_c", "residual_k")


def assert_leaves_out_one_block(case: Case, bad: float, steps_before: int) -> None:
    """Factors, momenta, weights of that block stay bit for bit; every other block steps as if nothing were wrong."""
    before, actual, clean, model, optimizer = runs_with_and_without(case, steps_before, "weight", (ROW, COL), bad)
    side = case.options.get("max_preconditioner_dim", 7)
    region = ref.block_slices(7, side)[-1], ref.block_slices(5, side)[-1]
    tile = max(name for name in clean if name.startswith("0 factor_c")).removeprefix("0 factor_c")
    expected = {name: value.clone() for name, value in clean.items()}
    for name in ("0 weight", "0 momentum_buffer", "0 weight_residual"):
        if name in expected:
            expected[name][region] = before[name][region]
    for name in (f"0 {entry}{tile}" for entry in BLOCK_ENTRIES):
        if name in expected:
            expected[name][-1] = before[name][-1]
    expected[f"0 skipped{tile}"][-1] += 1

    assert_same_bits(actual, expected)
    assert sum(int(value.sum()) for name, value in actual.items() if "skipped" in name) == 1
    steps = range(steps_before + 1, steps_before + 4)
    assert_recovers(model, optimizer, steps, optimizer.state[model.weight]["momentum_buffer"][region])


@SHAMPOOS
@NON_FINITE
@pytest.mark.parametrize("steps_before", [0, 3, 4], ids=["first-step", "update-step", "other-step"])
def test_a_non_finite_gradient_leaves_out_its_block_alone(case: Case, bad: float, steps_before: int) -> None:
    assert_leaves_out_one_block(case, bad, steps_before)


@SHAMPOOS
@pytest.mark.parametrize("steps_before", [0, 3], ids=["first-step", "update-step"])
def test_factors_that_would_overflow_leave_out_the_weights_as_well(case: Case, steps_before: int) -> None:
    """AAᵀ of such a gradient has no finite norm in FP32, but the step of the weights would have one."""
    assert_leaves_out_one_block(case, 1e17, steps_before)


@NON_FINITE
@pytest.mark.parametrize("steps_before", [0, 3], ids=["first-step", "later"])
def test_the_diagonal_step_leaves_out_the_elements_concerned_alone(case: Case, bad: float, steps_before: int) -> None:
    before, actual, clean, model, optimizer = runs_with_and_without(case, steps_before, "bias", 2, bad)
    expected = {name: value.clone() for name, value in clean.items()}
    for name in ("3 weight", "3 square", "3 momentum_buffer", "3 weight_residual"):
        if name in expected:
            expected[name][2] = before[name][2]
    expected["3 skipped"] += 1
    assert_same_bits(actual, expected)
    steps = range(steps_before + 1, steps_before + 4)
    assert_recovers(model, optimizer, steps, optimizer.state[model.bias]["momentum_buffer"])


def test_finite_gradients_are_never_counted_as_skipped(case: Case) -> None:
    """Not even gradients of zero."""
    model, optimizer = case.start()
    train(model, optimizer, range(6))
    for param in model.parameters():
        param.grad.zero_()
    optimizer.step()
    assert not any(value.any() for name, value in snapshot(optimizer).items() if "skipped" in name)
