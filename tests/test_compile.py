"""The operators and the step under `torch.compile`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import OPTIONS, SHAPES, Case, Model, assert_same_bits, gradients, snapshot, train
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from rootfree_kernels import IFShampoo, RFRMSProp, ops

BACKEND = "aot_eager"  # traces, functionalises and replays without a compiler


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


# ---- the step ------------------------------------------------------------------------------------------------------


def test_a_compiled_step_is_the_eager_step(case: Case) -> None:
    """Bit for bit, from the first step, which makes the state, to the third update at T = 3."""
    steps = range(8)
    model, optimizer = case.start()
    compiled = torch.compile(optimizer.step, backend=BACKEND)
    for step in steps:
        optimizer.zero_grad()
        model(step).backward()
        compiled()
    eager_model, eager = case.start()
    train(eager_model, eager, steps)
    assert_same_bits(snapshot(optimizer), snapshot(eager))


def regression(case: Case, **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    """A model that the compiler can trace, its optimizer, and data."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)).to(case.dtype)
    shapes = [tuple(param.shape) for param in model.parameters()]
    with torch.no_grad():
        for param, value in zip(model.parameters(), gradients(shapes, -1, case.dtype), strict=True):
            param.copy_(value)
    (data,) = gradients([(8, 5)], 0, case.dtype)
    return model, case.make(model.parameters(), **changes), data


def fit_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor) -> None:
    optimizer.zero_grad()
    (model(data) - data).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "float"])
def test_a_changing_lr_recompiles_nothing_and_takes_effect(case: Case, as_tensor: bool) -> None:
    """In a training step that is compiled as a whole. Its first two calls may compile: gradients appear in between."""
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(fit_step, backend=counter)
    lr = torch.tensor(0.01)
    run, eager = regression(case, lr=lr if as_tensor else 0.01), regression(case)
    frames = []
    for step in range(6):
        value = 0.01 / (1 + step)
        if as_tensor:
            lr.fill_(value)
        else:
            run[1].param_groups[0]["lr"] = value
        eager[1].param_groups[0]["lr"] = value
        compiled(*run)
        fit_step(*eager)
        frames.append(counter.frame_count)
    assert frames[0] >= 1
    assert frames[1:] == [frames[1]] * 5
    assert_same_bits(snapshot(run[1]), snapshot(eager[1]))


# ---- the operators -------------------------------------------------------------------------------------------------

BLOCKS, ROWS, COLS = 3, 5, 4
f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16


def numbers(*shape: int, dtype: torch.dtype = f32, seed: int = 0) -> Tensor:
    return gradients([shape], seed, dtype)[0]


def residual(*shape: int) -> Tensor:
    return (numbers(*shape) * 1000).to(torch.int16)


def seeds_and_steps(count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count, dtype=torch.int32), torch.full((count,), 3.0)


def scaler(used: bool) -> tuple[Tensor | None, Tensor | None]:
    """grad_scale, found_inf."""
    return (torch.tensor(8.0), torch.tensor(0.0)) if used else (None, None)


FLAGS = (False, True)
STORAGE = [(f32, "nearest"), (f64, "nearest"), (bf16, "nearest"), (bf16, "stochastic"), (bf16, "compensated")]
by_storage = pytest.mark.parametrize(("dtype", "rounding"), STORAGE, ids=lambda x: str(x))
with_and_without_amp = pytest.mark.parametrize("amp", FLAGS, ids=["plain", "amp"])


@by_storage
@with_and_without_amp
def test_rf_rmsprop_operator(dtype: torch.dtype, rounding: str, amp: bool) -> None:
    shapes = [(6,), (), (4, 3)]
    state_dtype = f64 if dtype == f64 else f32
    residuals = [residual(*shape) for shape in shapes] if rounding == "compensated" else []
    arguments = (
        [numbers(*shape, dtype=dtype) for shape in shapes],
        [torch.ones(shape, dtype=state_dtype) for shape in shapes],
        [torch.zeros(shape, dtype=state_dtype) for shape in shapes],
        [torch.zeros((), dtype=torch.int32) for _ in shapes],
        [],
        residuals,
        [numbers(*shape, dtype=dtype, seed=1) for shape in shapes],
        torch.tensor(0.01),
        *seeds_and_steps(len(shapes)),
        *scaler(amp),
        *(4.0, 0.1, 1.0, 0.9, 0.01, 0.1, amp, amp, "stochastic", rounding, "eager"),
    )
    opcheck(ops.rf_rmsprop, arguments)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_rf_rmsprop_operator_with_bf16_state(rounding: str) -> None:
    residuals = [residual(6)] if rounding == "compensated" else []
    arguments = (
        [numbers(6, dtype=bf16)],
        [torch.ones(6, dtype=bf16)],
        [torch.zeros(6, dtype=bf16)],
        [torch.zeros((), dtype=torch.int32)],
        residuals,
        [],
        [numbers(6, dtype=bf16, seed=1)],
        torch.tensor(0.01),
        *seeds_and_steps(1),
        *scaler(False),
        *(4.0, 0.1, 1.0, 0.9, 0.01, 0.1, False, False, rounding, "stochastic", "eager"),
    )
    opcheck(ops.rf_rmsprop, arguments)


@pytest.mark.parametrize(("dtype", "clip"), [(f32, "frobenius"), (f64, "row_sum"), (bf16, "none")], ids=str)
@with_and_without_amp
def test_clipped_momentum_operator(dtype: torch.dtype, clip: str, amp: bool) -> None:
    wide = torch.promote_types(dtype, f32)
    momenta = [numbers(BLOCKS, n, n, dtype=dtype) for n in (ROWS, COLS)]
    deltas = [numbers(BLOCKS, n, n, dtype=wide, seed=1) for n in (ROWS, COLS)]
    opcheck(ops.clipped_momentum, (momenta, deltas, scaler(amp)[1], 0.5, clip, "eager"))


@pytest.mark.parametrize(("from_dtype", "to_dtype"), [(f32, bf16), (bf16, f32), (f64, f64)], ids=str)
@with_and_without_amp
def test_kron_gather_operator(from_dtype: torch.dtype, to_dtype: torch.dtype, amp: bool) -> None:
    weights = [numbers(ROWS, BLOCKS * COLS, dtype=from_dtype), numbers(ROWS, COLS, dtype=from_dtype).mT.contiguous().mT]
    tiles = [0, 1, 0, BLOCKS, 0, 1, 0, 1]
    factors = [numbers(BLOCKS + 1, n, n, dtype=to_dtype) for n in (ROWS, COLS)] if amp else []
    opcheck(ops.kron_gather, (weights, tiles, ROWS, COLS, factors, scaler(amp)[0], to_dtype, amp, "eager"))


@by_storage
@pytest.mark.parametrize("cached", FLAGS, ids=["factors", "cached"])
@with_and_without_amp
def test_kron_factor_operator(dtype: torch.dtype, rounding: str, cached: bool, amp: bool) -> None:
    def square_matrices(seed: int, dtype: torch.dtype = dtype) -> list[Tensor]:
        return [numbers(BLOCKS, n, n, dtype=dtype, seed=seed) for n in (ROWS, COLS)]

    paired = rounding == "compensated"
    arguments = (
        *square_matrices(0),
        *square_matrices(1),
        *([residual(BLOCKS, n, n) for n in (ROWS, COLS)] if paired else (None, None)),
        *(square_matrices(2) if cached else (None, None)),
        numbers(BLOCKS, ROWS, COLS, dtype=dtype, seed=3),
        torch.zeros(3, BLOCKS, 0),
        *seeds_and_steps(BLOCKS),
        scaler(amp)[1],
        *(4.0, 0.2, 0.5, 0.01, 1.0, "frobenius", rounding, "eager"),
    )
    opcheck(ops.kron_factor, arguments)


@by_storage
@pytest.mark.parametrize("updated", FLAGS, ids=["kept", "updated"])
@with_and_without_amp
def test_kron_step_operator(dtype: torch.dtype, rounding: str, updated: bool, amp: bool) -> None:
    factors = [numbers(BLOCKS, n, n, dtype=bf16) for n in (ROWS, COLS)]
    paired = rounding == "compensated"
    arguments = (
        [numbers(ROWS, BLOCKS * COLS, dtype=dtype)],
        [numbers(ROWS, BLOCKS * COLS, dtype=f64 if dtype == f64 else f32, seed=1)],
        [residual(ROWS, BLOCKS * COLS)] if paired else [],
        [0, 1, 0, BLOCKS],
        torch.zeros(BLOCKS, dtype=torch.int32),
        *factors,
        numbers(BLOCKS, ROWS, COLS, seed=2),
        torch.zeros(1, BLOCKS, 0),
        torch.tensor(0.01),
        torch.tensor([True, False, True]) if updated else None,
        *seeds_and_steps(BLOCKS),
        scaler(amp)[1],
        *(not updated, 0.9, 0.1, amp, rounding, "eager"),
    )
    opcheck(ops.kron_step, arguments)


@pytest.mark.parametrize("optimizer", [RFRMSProp, IFShampoo])
def test_every_operator_of_a_step_is_checked_above(optimizer: Any) -> None:
    """A step calls no operator of this library but these."""
    checked = {"rf_rmsprop", "clipped_momentum", "kron_gather", "kron_factor", "kron_step"}
    model = Model()
    opt = optimizer(model.parameters(), **OPTIONS)
    model(0).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    called = {event.key.split("::")[1] for event in profile.key_averages() if event.key.startswith("rootfree::")}
    assert called and called <= checked
    assert len(opt.state) == len(SHAPES)
