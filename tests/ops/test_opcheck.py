"""The operators pass PyTorch's `opcheck` on every backend except C++ (see test_on_cpp.py)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from rootfree_kernels import RECIPE as RECIPE_OPTIONS
from rootfree_kernels import IFShampoo, RFRMSProp
from tests.calls.operators import call, operator
from tests.calls.optimizers import SHAPES, Model, gradients

BLOCKS, ROWS, COLS = 2, 5, 4
f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
DEVICES = {"eager": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
NEEDS = {
    "eager": [],
    "triton": [
        pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
        pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton"),
        *([pytest.mark.gpu] if torch.cuda.is_available() else []),
    ],
}


def backends(names: str, eager: Iterable[tuple[Any, ...]], triton: Iterable[tuple[Any, ...]]) -> Any:
    """Parametrize a test with the cases of each backend. Triton has few: a check takes seconds in the interpreter."""
    cases = {"eager": eager, "triton": triton}
    params = [pytest.param(name, *case, marks=NEEDS[name]) for name in cases for case in cases[name]]
    return pytest.mark.parametrize(f"backend, {names}", params, ids=str)


def check(stem: str, *arguments: Any) -> None:
    """Run `opcheck` on the device of the backend. The last argument is the backend."""
    device = DEVICES[arguments[-1]]
    opcheck(operator(stem), tree_map_only(Tensor, lambda x: x.to(device), arguments))


def numbers(*shape: int, dtype: torch.dtype = f32, seed: int = 0) -> Tensor:
    return gradients([shape], seed, dtype)[0]


def residual(*shape: int) -> Tensor:
    return (numbers(*shape) * 1000).to(torch.int16)


def seeds_and_steps(count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count, dtype=torch.int32), torch.full((count,), 3)


def scaler(used: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return grad_scale and found_inf."""
    return (torch.tensor(8.0), torch.tensor(0.0)) if used else (None, None)


FLAGS = (False, True)
STORAGE = [(f32, "nearest"), (f64, "nearest"), (bf16, "nearest"), (bf16, "stochastic"), (bf16, "compensated")]


@backends(
    "storage, amp",
    product(STORAGE, FLAGS),
    [((f32, "nearest"), True), ((bf16, "stochastic"), False), ((bf16, "compensated"), True)],
)
def test_rf_rmsprop_operator(backend: str, storage: tuple[torch.dtype, str], amp: bool) -> None:
    shapes, (dtype, rounding) = [(6,), (), (4, 3)], storage
    state_dtype = f64 if dtype == f64 else f32
    check(
        "rf_rmsprop",
        [numbers(*shape, dtype=dtype) for shape in shapes],
        [torch.ones(shape, dtype=state_dtype) for shape in shapes],
        [torch.zeros(shape, dtype=state_dtype) for shape in shapes],
        [torch.zeros((), dtype=torch.int32) for _ in shapes],
        [],
        [residual(*shape) for shape in shapes] if rounding == "compensated" else [],
        [numbers(*shape, dtype=dtype, seed=1) for shape in shapes],
        torch.tensor(0.01),
        *seeds_and_steps(len(shapes)),
        *scaler(amp),
        *(4.0, 0.1, 1.0, 0.9, 0.01, 0.1, amp, amp, "stochastic", rounding, backend),
    )


@backends("rounding", [("stochastic",), ("compensated",)], [("stochastic",), ("compensated",)])
def test_rf_rmsprop_operator_with_bf16_state(backend: str, rounding: str) -> None:
    check(
        "rf_rmsprop",
        [numbers(6, dtype=bf16)],
        [torch.ones(6, dtype=bf16)],
        [torch.zeros(6, dtype=bf16)],
        [torch.zeros((), dtype=torch.int32)],
        [residual(6)] if rounding == "compensated" else [],
        [],
        [numbers(6, dtype=bf16, seed=1)],
        torch.tensor(0.01),
        *seeds_and_steps(1),
        *scaler(False),
        *(4.0, 0.1, 1.0, 0.9, 0.01, 0.1, False, False, rounding, "stochastic", backend),
    )


@backends(
    "dtype, clip, amp",
    [(*case, amp) for case in [(f32, "frobenius"), (f64, "row_sum"), (bf16, "none")] for amp in FLAGS],
    [(f32, "row_sum", True), (bf16, "frobenius", False)],
)
def test_clipped_momentum_operator(backend: str, dtype: torch.dtype, clip: str, amp: bool) -> None:
    wide = torch.promote_types(dtype, f32)
    momenta = [numbers(BLOCKS, n, n, dtype=dtype) for n in (ROWS, COLS)]
    deltas = [numbers(BLOCKS, n, n, dtype=wide, seed=1) for n in (ROWS, COLS)]
    check("clipped_momentum", momenta, deltas, scaler(amp)[1], 0.5, clip, backend)


@backends(
    "dtypes, amp",
    product([(f32, bf16), (bf16, f32), (f64, f64)], FLAGS),
    [((f32, bf16), False), ((bf16, bf16), True)],
)
def test_kron_gather_operator(backend: str, dtypes: tuple[torch.dtype, torch.dtype], amp: bool) -> None:
    from_dtype, to_dtype = dtypes
    weights = [numbers(ROWS, BLOCKS * COLS, dtype=from_dtype), numbers(ROWS, COLS, dtype=from_dtype).mT.contiguous().mT]
    tiles = [0, 1, 0, BLOCKS, 0, 1, 0, 1]
    factors = [numbers(BLOCKS + 1, n, n, dtype=to_dtype) for n in (ROWS, COLS)] if amp else []
    check("kron_gather", weights, tiles, ROWS, COLS, factors, scaler(amp)[0], to_dtype, amp, backend)


def gathered(backend: str, dtype: torch.dtype, factors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return G of BLOCKS blocks, padded as the backend requires, and its sums of squares."""
    to_device = [x.to(DEVICES[backend]) for x in (numbers(ROWS, BLOCKS * COLS, seed=3), *factors)]
    grads, factors = to_device[:1], to_device[1:]
    return call(backend, "kron_gather", grads, [0, 1, 0, BLOCKS], ROWS, COLS, factors, None, dtype, False)


PAPER, RECIPE = ("root_free", False, "identity"), ("whitened", True, "gradient")


@backends(
    "storage, cached, amp, rule",
    [*product(STORAGE, FLAGS, FLAGS, [PAPER]), *product(STORAGE, [False], FLAGS, [RECIPE])],
    [
        ((bf16, "stochastic"), True, False, PAPER),
        ((bf16, "compensated"), False, True, PAPER),
        ((bf16, "stochastic"), False, True, RECIPE),
    ],
)
def test_kron_factor_operator(
    backend: str, storage: tuple[torch.dtype, str], cached: bool, amp: bool, rule: tuple[str, bool, str]
) -> None:
    dtype, rounding = storage

    def square_matrices(seed: int) -> list[Tensor]:
        return [numbers(BLOCKS, n, n, dtype=dtype, seed=seed) for n in (ROWS, COLS)]

    paired = rounding == "compensated"
    check(
        "kron_factor",
        *square_matrices(0),
        *square_matrices(1),
        *([residual(BLOCKS, n, n) for n in (ROWS, COLS)] if paired else (None, None)),
        *(square_matrices(2) if cached else (None, None)),
        None if rule == PAPER else torch.zeros(BLOCKS, dtype=torch.promote_types(dtype, f32)),
        *gathered(backend, dtype, square_matrices(0) if rule == PAPER else []),
        *seeds_and_steps(BLOCKS),
        scaler(amp)[1],
        *(4.0, 0.2, 0.5, 0.01, 1.0, "frobenius", rounding, *rule, backend),
    )


@backends(
    "storage, updated, amp, momentum_on",
    product(STORAGE, FLAGS, FLAGS, ["update", "gradient"]),
    [
        ((f32, "nearest"), True, False, "update"),
        ((bf16, "stochastic"), False, True, "update"),
        ((bf16, "compensated"), True, True, "update"),
        ((bf16, "compensated"), True, True, "gradient"),
    ],
)
def test_kron_step_operator(
    backend: str, storage: tuple[torch.dtype, str], updated: bool, amp: bool, momentum_on: str
) -> None:
    dtype, rounding = storage
    averages = momentum_on == "gradient"
    check(
        "kron_step",
        [numbers(ROWS, BLOCKS * COLS, dtype=dtype)],
        [numbers(ROWS, BLOCKS * COLS, dtype=f64 if dtype == f64 else f32, seed=1)],
        [residual(ROWS, BLOCKS * COLS)] if rounding == "compensated" else [],
        [0, 1, 0, BLOCKS],
        torch.zeros(BLOCKS, dtype=torch.int32),
        torch.ones(BLOCKS, dtype=f64 if dtype == f64 else f32) if averages else None,
        *(numbers(BLOCKS, n, n, dtype=bf16) for n in (ROWS, COLS)),
        *gathered(backend, f32 if backend == "eager" else bf16, []),
        torch.tensor(0.01),
        torch.tensor([True, False]) if updated else None,
        *seeds_and_steps(BLOCKS),
        scaler(amp)[1],
        *(not updated, 0.9, 0.1, amp, rounding, momentum_on, averages and amp, backend),
    )


@backends(
    "storage, momentum_on, amp",
    product(STORAGE, ["update", "gradient"], FLAGS),
    [((bf16, "stochastic"), "gradient", False), ((bf16, "compensated"), "gradient", True)],
)
def test_scaled_rmsprop_operator(backend: str, storage: tuple[torch.dtype, str], momentum_on: str, amp: bool) -> None:
    shapes, (dtype, rounding) = [(6,), (), (4, 3)], storage
    state_dtype = f64 if dtype == f64 else f32
    averages = momentum_on == "gradient"
    check(
        "scaled_rmsprop",
        [numbers(*shape, dtype=dtype) for shape in shapes],
        [torch.ones(shape, dtype=state_dtype) for shape in shapes],
        [torch.zeros(shape, dtype=state_dtype) for shape in shapes],
        [torch.zeros((), dtype=torch.int32) for _ in shapes],
        [torch.zeros((), dtype=state_dtype) for _ in shapes] if averages else [],
        [],
        [residual(*shape) for shape in shapes] if rounding == "compensated" else [],
        torch.ones(len(shapes), dtype=state_dtype) if averages else None,
        [numbers(*shape, dtype=dtype, seed=1) for shape in shapes],
        torch.tensor(0.01),
        *seeds_and_steps(len(shapes)),
        *scaler(amp),
        *(4.0, 0.1, 1.0, 0.9, 0.01, 0.1, amp, amp, "stochastic", rounding),
        *("whitened", averages, momentum_on, averages, backend),
    )


@pytest.mark.parametrize("optimizer", [RFRMSProp, IFShampoo, partial(IFShampoo, **RECIPE_OPTIONS)])
def test_every_operator_of_a_step_is_checked_above(optimizer: Any) -> None:
    """A step calls only operators that are checked above."""
    checked = {"rf_rmsprop", "scaled_rmsprop", "clipped_momentum", "kron_gather", "kron_factor", "kron_step"}
    model = Model()
    opt = optimizer(model.parameters(), lr=0.01, batch_size=4)
    model(0).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    called = {event.key.split("::")[1] for event in profile.key_averages() if event.key.startswith("rootfree::")}
    assert called and called <= checked
    assert len(opt.state) == len(SHAPES)
