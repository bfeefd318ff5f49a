"""The optimizers with C++ kernels, compared with eager PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rootfree_kernels import IFShampoo, RFRMSProp
from rootfree_kernels.optim.recipe import RECIPE
from rootfree_kernels.optim.report import step_reports
from rootfree_kernels.rounding import join_compensated
from tests.calls.cpu import needs_cpp
from tests.calls.optimizers import OPTIONS, gradients, snapshot
from tests.calls.tensors import BF16, FP16, FP32, FP64, assert_same_bits
from tests.calls.tolerances import one_step

pytestmark = needs_cpp


SHAPES = [(24, 16), (24, 16), (8, 3, 2, 2), (24,), ()]
COMPENSATED = {"rounding": "compensated", "weight_rounding": "compensated"}


@pytest.fixture(autouse=True)
def backend_unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)
    yield


def start(optimizer: Any, dtype: torch.dtype, **options: Any) -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(x) for x in gradients(SHAPES, -1, dtype)]
    return params, optimizer(params, **{**OPTIONS, **options})


def run(params: list[nn.Parameter], optimizer: Any, step: int) -> None:
    for param, grad in zip(params, gradients(SHAPES, step, params[0].dtype), strict=True):
        param.grad = grad
    optimizer.step()


def values(optimizer: Any) -> dict[str, Tensor]:
    """Return a snapshot with the FP32 values of compensated pairs."""
    shot = snapshot(optimizer)
    for name in [name for name in shot if "residual" in name]:
        residual, value = shot.pop(name), name.replace("weight_residual", "weight").replace("residual", "factor")
        shot[value] = join_compensated(shot[value], residual)
    return shot


@pytest.mark.parametrize(
    ("optimizer", "dtype", "options", "products"),
    [
        pytest.param(IFShampoo, FP32, {"factor_dtype": FP32}, FP32, id="shampoo-fp32"),
        pytest.param(IFShampoo, FP32, {"clip": "row_sum", "state_dtype": BF16}, BF16, id="shampoo-bf16-factors"),
        pytest.param(IFShampoo, BF16, COMPENSATED, BF16, id="shampoo-compensated"),
        pytest.param(
            *(IFShampoo, FP16, {"precondition_frequency": 3, "max_preconditioner_dim": 10, "maximize": True}, BF16),
            id="shampoo-T3-tiles",
        ),
        pytest.param(
            *(IFShampoo, FP32, {"precondition_frequency": 3, "max_preconditioner_dim": 10, "factor_dtype": FP32}, FP32),
            id="shampoo-T3-tiles-fp32",
        ),
        pytest.param(IFShampoo, FP32, {**RECIPE, "factor_dtype": FP32}, FP32, id="recipe-fp32"),
        pytest.param(IFShampoo, BF16, {**RECIPE, **COMPENSATED, "update_norm": None}, BF16, id="recipe-compensated"),
        pytest.param(
            *(IFShampoo, FP16, {**RECIPE, "direction": "root_free", "max_preconditioner_dim": 10}, BF16),
            id="recipe-root-free-tiles",
        ),
        pytest.param(RFRMSProp, FP32, {}, FP32, id="rmsprop-fp32"),
        pytest.param(RFRMSProp, BF16, {**COMPENSATED, "decoupled_weight_decay": True}, FP32, id="rmsprop-compensated"),
        pytest.param(RFRMSProp, FP16, {"maximize": True}, FP32, id="rmsprop-fp16"),
    ],
)
def test_steps_match_eager_pytorch(optimizer, dtype, options, products):
    """Before each step, eager PyTorch's weights and state are copied to the other run, so errors do not add up.

    The copies do not change the versions of tensors, so cached products stay valid.
    """
    twins = [start(optimizer, dtype, **options, fused=fused) for fused in (False, None)]
    for step in range(5):
        for source, target in zip(*(params for params, _ in twins), strict=True):
            target.data.copy_(source)
            for name, value in twins[1][1].state.get(target, {}).items():
                value.data.copy_(twins[0][1].state[source][name])
        before = values(twins[0][1])
        for twin in twins:
            run(*twin, step)
        expected, actual = (values(twin[1]) for twin in twins)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            moved = (value.double() - before.get(name, torch.zeros(()))).norm()
            error = (actual[name].double() - value.double()).norm()
            stored = torch.finfo(value.dtype).eps * value.double().norm() if value.is_floating_point() else 0
            assert error <= one_step(FP32, products=products) * moved + stored, f"{name} in step {step}"


@pytest.mark.parametrize(
    ("dtype", "fused", "expected"),
    [
        *((dtype, None, "cpp") for dtype in (FP32, BF16, FP16)),
        *((FP64, None, "eager"), (FP32, False, "eager"), (BF16, True, "cpp")),
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", [IFShampoo, RFRMSProp])
def test_cpu_uses_this_backend_if_possible(optimizer, dtype, fused, expected):
    params, stepped = start(optimizer, dtype, fused=fused)
    run(params, stepped, 0)
    assert {batch.backend.name for batches in step_reports(stepped) for batch in batches} == {expected}


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("rule", [{}, RECIPE], ids=["paper", "recipe"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_resumed_run_matches_an_uninterrupted_run_bitwise(dtype, rule, frequency):
    options = {"precondition_frequency": frequency, "max_preconditioner_dim": 10, "weight_rounding": "compensated"}
    options |= rule
    whole, first = start(IFShampoo, dtype, **options), start(IFShampoo, dtype, **options)
    for step in range(7):
        run(*whole, step)
    for step in range(4):
        run(*first, step)
    resumed = start(IFShampoo, dtype, **options)
    for target, source in zip(resumed[0], first[0], strict=True):
        target.data.copy_(source)
    resumed[1].load_state_dict(first[1].state_dict())
    for step in range(4, 7):
        run(*resumed, step)
    assert_same_bits(snapshot(resumed[1]), snapshot(whole[1]))
