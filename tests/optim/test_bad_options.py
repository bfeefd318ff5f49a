"""Bad options raise before anything changes. The error names the option, its value and a remedy."""

from __future__ import annotations

import copy
import inspect
import math
import re
from typing import Any

import pytest
import torch

from rootfree_kernels import GrowingInterval, IFShampoo, RFAdaGrad, RFRMSProp
from tests.calls.optimizers import OPTIONS, Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits, same_bits

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
    "factor_dtype": (torch.float16, torch.int8, None, "bf16"),
    "matmul_dtype": (torch.float16, "Tensor"),
    "state_dtype": (torch.float16, torch.int16, "torch.nn"),
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


@pytest.mark.parametrize(("optimizer", "name", "value"), BAD_OPTIONS)
def test_a_bad_option_is_an_error_everywhere(optimizer: Any, name: str, value: Any) -> None:
    """Test the constructor, a new group, and an existing group between two steps."""
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
    opt.param_groups[1][name] = value  # the first group is valid, but must not step either
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
def test_growing_interval_requires_an_integer(max_interval: Any) -> None:
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
    """The step raises for all groups. The change is not silently ignored."""
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


@pytest.mark.parametrize("optimizer", [RFRMSProp, IFShampoo])
@pytest.mark.parametrize("beta2", [0.999999, 1, 1.5])
def test_beta2_of_1_or_more_is_an_error_for_averages(optimizer: Any, beta2: float) -> None:
    params = list(Model().parameters())
    if beta2 < 1:
        optimizer(params, **OPTIONS, beta2=beta2)
    else:
        with pytest.raises(ValueError, match=rf"beta2={beta2}: pass a number below 1"):
            optimizer(params, **OPTIONS, beta2=beta2)


def test_beta2_of_1_is_allowed_for_sums() -> None:
    optimizer = RFAdaGrad(Model().parameters(), **OPTIONS, beta2=1.5)
    assert optimizer.param_groups[0]["gamma"] == 0.0


# ---- backends --------------------------------------------------------------------------------------------------------


def test_fused_is_refused_when_the_optimizer_is_made(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rootfree_kernels.native._build_problem", lambda backend: "it was not built")
    with pytest.raises(RuntimeError, match=r"fused=True .* cpp: it was not built.* eager: it has no fused kernels"):
        case.make(Model().parameters(), fused=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_serves_fp64_and_meta_parameters_by_eager_pytorch(case: Case, device: str) -> None:
    """No backend has kernels for them. torch.optim accepts such parameters with fused=True."""
    dtype = torch.float64 if device == "cpu" else torch.float32
    finals = []
    for options in ({"fused": True}, {"fused": False}):
        model = Model(dtype).to(device)
        optimizer = case.make(model.parameters(), **options)
        for _ in range(3):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
        finals.append(snapshot(optimizer))
    if device == "cpu":
        assert_same_bits(*finals)


@pytest.mark.parametrize("backend", ["cuda", "triton", "no-such-backend"])
def test_a_forced_backend_that_cannot_run_says_why(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These backends do not run on a CPU. Triton's interpreter, which other tests use, is disabled."""
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
