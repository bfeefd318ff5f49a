"""Options given as numbers of other libraries, and dtypes given by name."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from rootfree_kernels import IFShampoo, RFRMSProp
from tests.calls.optimizers import OPTIONS, Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits

NUMBERS = {
    "lr": (np.float64(0.25), np.float32(0.25), np.array(0.25), Fraction(1, 4), Decimal("0.25")),
    "batch_size": (np.int64(8), np.float32(8), np.array(8), torch.tensor(8), torch.tensor(8.0)),
    "beta2": (np.float64(0.25), np.float16(0.25)),
    "momentum": (np.float32(0.5),),
    "damping": (np.float32(0.5),),
    "weight_decay": (np.float32(0.5),),
    "gamma": (np.int64(1), np.float32(1)),
    "seed": (np.int64(3), np.uint8(3)),
    "max_preconditioner_dim": (np.int64(4),),
    "precondition_frequency": (np.int32(2),),
    "maximize": (np.bool_(True),),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values], ids=repr
)
def test_numbers_of_other_libraries_become_pythons(name: str, value: Any) -> None:
    """This holds in the constructor, in a new group, and where a schedule has set it between two steps."""
    expected = value.item() if hasattr(value, "item") else float(value)
    model = Model()
    params = list(model.parameters())
    optimizer = IFShampoo(params[:2], **{**OPTIONS, name: value})
    optimizer.add_param_group({"params": params[2:4], name: value})
    optimizer.add_param_group({"params": params[4:]})
    assert [group[name] for group in optimizer.param_groups] == [expected] * 3
    assert {type(group[name]) for group in optimizer.param_groups} == {type(expected)}
    train(model, optimizer, range(1))
    for group in optimizer.param_groups:
        group["lr" if name in ("seed", "max_preconditioner_dim") else name] = value
    if name not in ("seed", "max_preconditioner_dim"):  # they are set before the first step
        train(model, optimizer, range(1, 2))
        assert {type(group[name]) for group in optimizer.param_groups} == {type(expected)}


@pytest.mark.parametrize(
    "value", [np.float64(np.nan), np.array([0.1, 0.2]), np.bool_(True), np.str_("1"), 1j], ids=repr
)
def test_what_is_no_finite_number_is_refused(case: Case, value: Any) -> None:
    for name in ("lr", "batch_size", "damping"):
        with pytest.raises(ValueError, match=rf"{name}=.*pass"):
            case.make(Model().parameters(), **{name: value})


@pytest.mark.parametrize(
    "factor", [lambda t: np.float64(0.9) ** t, lambda t: np.float32(0.9**t), lambda t: np.array(0.9**t)]
)
def test_a_schedule_of_numpy_numbers_trains_as_one_of_floats(case: Case, factor: Any) -> None:
    finals = []
    for function in (factor, lambda t: float(factor(t))):
        model, optimizer = case.start()
        schedule = LambdaLR(optimizer, function)
        for step in range(3):
            train(model, optimizer, [step])
            schedule.step()
        finals.append(snapshot(optimizer))
    assert_same_bits(*finals)


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_may_be_given_by_its_name(name: str) -> None:
    for optimizer, option in ((IFShampoo, "factor_dtype"), (IFShampoo, "matmul_dtype"), (RFRMSProp, "state_dtype")):
        made = optimizer(Model().parameters(), **OPTIONS, **{option: name})
        assert made.param_groups[0][option] is made.defaults[option] is torch.bfloat16
