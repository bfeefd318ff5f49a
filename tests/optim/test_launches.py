"""Launches of a step with Triton kernels, and its tables of addresses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from tests.calls.backends import functions_of, modules_that_launch, stand_in
from tests.calls.device import DEVICE, kernel_test, launches
from tests.calls.optimizers import OPTIONS, snapshot
from tests.calls.tables import forget_tables, note_copies
from tests.calls.tensors import BF16, FP32
from tests.optim.triton_runs import COMPENSATED, backend, parameters, set_gradients, start

pytestmark = kernel_test


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_tables(monkeypatch)


class Work(TorchDispatchMode):
    """Record PyTorch's operations inside operators, except views and allocations."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        host_reads_host = name == "_local_scalar_dense" and args[0].device.type == "cpu"
        if not func.is_view and not host_reads_host and not name.startswith(("empty", "new_empty")):
            self.notes.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def noted_work() -> Iterator[list[str]]:
    """Record launched kernels and PyTorch's operations inside operators, in order."""
    notes: list[str] = []
    work = Work(notes)

    def launch(kernel: Any, grid: int, *args: Any, **kwargs: Any) -> None:
        if grid:
            notes.append(kernel.fn.__name__)
        work.notes = []  # drop operations of the interpreter
        launches.launch(kernel, grid, *args, **kwargs)
        work.notes = notes

    def watched(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            with work:
                return function(*args, **options)

        return call

    functions = functions_of("triton", "kron_gather", "kron_factor", "kron_step")
    with pytest.MonkeyPatch.context() as patch:
        for module in modules_that_launch():
            patch.setattr(module, "launch", launch)
        stand_in(patch, "triton", **{name: watched(function) for name, function in functions.items()})
        yield notes


GATHER = ["kron_gather_kernel"]
UPDATE = ["bmm", "bmm", "kron_momentum_kernel", "kron_factor_kernel", "kron_products_kernel"]
STEP = ["bmm", "kron_step_kernel"]
WHITENED_UPDATE = ["kron_start_kernel", "bmm", "bmm", "kron_momentum_kernel", "kron_norms_kernel", "kron_whiten_kernel"]
WHITENED_UPDATE += ["_foreach_copy_"]
STEP_IN_PARTS = ["kron_average_kernel", "bmm", "bmm", "kron_size_kernel", "kron_apply_kernel"]
SCALED = ["scaled_squares_kernel", "scaled_average_kernel", "scaled_step_kernel"]


@pytest.mark.parametrize(("num_layers", "frequency", "dtype"), [(1, 1, FP32), (1, 3, BF16), (5, 3, FP32)], ids=str)
def test_number_of_launches_of_a_step(num_layers: int, frequency: int, dtype: torch.dtype) -> None:
    """It does not depend on the number of layers. Sides are multiples of 8, so nothing is padded, cast or copied."""
    params = parameters(start([(16, 24)] * num_layers, dtype))
    optimizer = IFShampoo(
        params, **{**OPTIONS, "lr": torch.tensor(0.01, device=DEVICE)}, precondition_frequency=frequency
    )
    set_gradients(params, 0)
    for step in range(4):
        with backend("triton"), noted_work() as notes:
            optimizer.step()
        if step >= 2:  # earlier steps create tables and constants
            assert notes == [*GATHER, *(UPDATE if step % frequency == 0 else []), *STEP], f"step {step}"


def test_clipping_by_row_sums_adds_one_launch() -> None:
    params = parameters(start([(16, 24)] * 2, FP32))
    optimizer = IFShampoo(params, **{**OPTIONS, "lr": torch.tensor(0.01, device=DEVICE)}, clip="row_sum")
    set_gradients(params, 0)
    for _ in range(3):  # the first steps create tables and constants
        with backend("triton"), noted_work() as notes:
            optimizer.step()
    by_row_sums = [*UPDATE]
    by_row_sums.insert(UPDATE.index("kron_factor_kernel"), "kron_norms_kernel")
    assert notes == [*GATHER, *by_row_sums, *STEP]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_number_of_launches_of_the_recipe(num_layers: int) -> None:
    params = parameters(start([(16, 24)] * num_layers + [(24,)] * num_layers, FP32))
    options = {**OPTIONS, **RECIPE, "lr": torch.tensor(0.01, device=DEVICE)}
    optimizer = IFShampoo(params, **options)
    set_gradients(params, 0)
    for _ in range(3):  # the first steps create tables and constants
        with backend("triton"), noted_work() as notes:
            optimizer.step()
    matrices = [*GATHER, *WHITENED_UPDATE, *STEP_IN_PARTS]
    assert sorted(notes) == sorted([*matrices, *SCALED])
    assert [name for name in notes if name not in SCALED] == matrices
    assert [name for name in notes if name in SCALED] == SCALED


def test_changed_values_do_not_recompile() -> None:
    params = parameters(start([(16, 24)], BF16))
    optimizer = IFShampoo(params, **OPTIONS)
    with backend("triton"):
        set_gradients(params, 0)
        optimizer.step()
        before = launches.num_compilations()
        changes = {"lr": 1e-3, "batch_size": 7, "beta2": 0.5, "damping": 1.0, "momentum": 0, "weight_decay": 0}
        changes |= {"riemannian_momentum": 0, "maximize": True, "decoupled_weight_decay": True, "gamma": 0}
        optimizer.param_groups[0].update(changes)
        set_gradients(params, 1)
        optimizer.step()
    assert launches.num_compilations() == before


# ---- tables, versions ------------------------------------------------------------------------------------------------


def test_unchanged_addresses_need_no_new_table(no_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = note_copies(monkeypatch)
    params = parameters(start([(9, 5), (9, 5), (6,)]))
    optimizer = IFShampoo(params, **OPTIONS)
    with backend("triton"):
        for step in range(3):
            set_gradients(params, step) if step == 0 else [param.grad.neg_() for param in params]
            optimizer.step()
            assert bool(copied) == (step == 0), f"step {step}"
            copied.clear()


@pytest.mark.parametrize("optimizer", [IFShampoo, RFRMSProp])
def test_default_device_does_not_affect_a_step(optimizer: Any, no_tables: None) -> None:
    params = parameters(start([(9, 5), (6,)]))
    optimizer = optimizer(params, **OPTIONS)
    set_gradients(params, 0)
    with backend("triton"), torch.device("meta"):  # an example of another device
        optimizer.step()
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize(("optimizer", "options"), [(IFShampoo, {}), (RFRMSProp, {}), (IFShampoo, RECIPE)], ids=str)
def test_a_step_increments_the_versions_of_all_changed_tensors(optimizer: Any, options: dict[str, Any]) -> None:
    params = parameters(start([(16, 8), (6,)], BF16))
    optimizer = optimizer(params, **{**OPTIONS, **COMPENSATED, **options})

    def tensors() -> dict[str, Tensor]:
        states = [optimizer.state[param] for param in params]
        found = {f"{i} {name}": x for i, state in enumerate(states) for name, x in state.items() if name != "skipped"}
        return {**found, **{f"{i} weight": param for i, param in enumerate(params)}}

    with backend("triton"):
        for step in range(2):
            set_gradients(params, step)
            if step == 1:
                before, copies = {name: x._version for name, x in tensors().items()}, snapshot(optimizer)
            optimizer.step()
    after = snapshot(optimizer)
    for name, x in tensors().items():
        assert not torch.equal(after[name], copies[name]), name
        assert x._version > before[name], name
