"""The optimizers on Triton's kernels: the steps of eager PyTorch, in a handful of launches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import OPTIONS, assert_same_bits, gradients, snapshot
from test_conventions import channels_last, permuted, sliced
from tolerances import RELATIVE_ERROR
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_device import DEVICE, kernel_test

from rootfree_kernels import IFShampoo, RFAdaGrad, RFRMSProp, backends, tables, triton_kernels
from rootfree_kernels.rounding import join_compensated
from rootfree_kernels.triton_kernels import launch as launches

pytestmark = [*kernel_test, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BOTH = ("eager", "triton")


@contextmanager
def backend(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOTFREE_BACKEND", name)
        yield


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table is kept from earlier tests, whose tensors may have lain at the same addresses."""
    for name in ("_tables", "_block_tables", "_tensor_tables"):
        monkeypatch.setattr(tables, name, type(tables._tables)())


def on_device(x: Tensor) -> Tensor:
    """A copy on the device that lies in memory as `x` does, gaps included."""
    memory = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage()).to(DEVICE, copy=True)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def parameters(tensors: Iterable[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(on_device(x)) for x in tensors]


def start(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = FP32) -> list[Tensor]:
    return gradients(shapes, -1, dtype)


def set_gradients(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    grads = gradients([tuple(param.shape) for param in params], step, params[0].dtype)
    for param, grad in zip(params, grads, strict=True):
        param.grad = (grad * scale).to(DEVICE)


# ---- the steps of eager PyTorch ------------------------------------------------------------------------------------


def values(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A snapshot with compensated pairs joined to their FP32 values."""
    shot = snapshot(optimizer)
    for name in [name for name in shot if "residual" in name]:
        residual = shot.pop(name)
        value = name.replace("weight_residual", "weight").replace("square_residual", "square")
        value = value.replace("residual", "factor")
        shot[value] = join_compensated(shot[value], residual)
    return shot


class Twins:
    """The same parameters and the same state, stepped by eager PyTorch and by Triton, and compared after each step."""

    def __init__(self, tensors: Sequence[Tensor], optimizer: Callable[..., Any], **options: Any) -> None:
        if optimizer is IFShampoo:
            options["matmul_dtype"] = BF16  # which eager PyTorch would choose for itself on some processors alone
        self.tolerance = RELATIVE_ERROR[BF16 if optimizer is IFShampoo else FP32]
        self.params = {name: parameters(tensors) for name in BOTH}
        self.optimizers = {name: optimizer(self.params[name], **{**OPTIONS, **options}) for name in BOTH}

    def step(self, step: int, present: Iterable[int] | None = None, scale: float = 1.0) -> None:
        self.resynchronise()
        before = values(self.optimizers["eager"])
        for name in BOTH:
            set_gradients(self.params[name], step, scale)
            for index, param in enumerate(self.params[name]):
                if present is not None and index not in present:
                    param.grad = None
            with backend(name):
                self.optimizers[name].step()
        expected, actual = (values(self.optimizers[name]) for name in BOTH)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            self.compare(name, actual[name], value, before.get(name))

    def compare(self, name: str, actual: Tensor, expected: Tensor, before: Tensor | None) -> None:
        """What changed agrees within the tolerance, and the whole within a rounding to the dtype that it has."""
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        if not expected.is_floating_point():
            assert torch.equal(actual, expected), name
            return
        moved = expected.double() - (0 if before is None else before.double())
        rounding = torch.finfo(expected.dtype).eps * expected.double().norm()
        error, allowed = (actual.double() - expected.double()).norm(), self.tolerance * moved.norm() + rounding
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}, moved by {moved.norm():.1e}"

    def resynchronise(self) -> None:
        """Errors do not add up. These writes are hidden from autograd, so that products which are kept stay."""
        for source, target in zip(*self.params.values(), strict=True):
            target.data.copy_(source)
            states = [self.optimizers[name].state.get(x, {}) for name, x in zip(BOTH, (source, target), strict=True)]
            for name, value in states[1].items():
                value.data.copy_(states[0][name])


SHAPES = [(24, 16), (24, 16), (8, 3, 2, 2), (24,), ()]
"""Two of one shape, a convolution of 8 × 12, and two that take the diagonal step."""

COMPENSATED = {"rounding": "compensated", "weight_rounding": "compensated"}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(FP32, {}, id="fp32"),
        pytest.param(BF16, {"state_dtype": BF16, "clip": "row_sum"}, id="bf16"),
        pytest.param(BF16, {**COMPENSATED, "maximize": True}, id="bf16-compensated"),
        pytest.param(FP16, {"rounding": "nearest", "damping": 0.0, "gamma": 0}, id="fp16"),
        pytest.param(FP32, {"clip": "none", "beta2": 0.05, "decoupled_weight_decay": True}, id="decoupled"),
    ],
)
def test_if_shampoo_steps_as_eager_pytorch(dtype: torch.dtype, options: dict[str, Any]) -> None:
    twins = Twins(start(SHAPES, dtype), IFShampoo, **options)
    for step in range(2):
        twins.step(step)


@pytest.mark.parametrize("options", [{}, {"cache_products": False}], ids=["kept", "not kept"])
def test_if_shampoo_steps_as_eager_pytorch_between_updates(options: dict[str, Any]) -> None:
    """Blocks of 16 × 18 and of 15 × 18."""
    twins = Twins(start([(31, 18)]), IFShampoo, precondition_frequency=3, max_preconditioner_dim=20, **options)
    for step in range(5):
        twins.step(step)


def test_if_shampoo_steps_as_eager_pytorch_where_gradients_come_and_go() -> None:
    """Some of a batch are due, and some are not; some have no gradient."""
    twins = Twins(start([(9, 5)] * 3), IFShampoo, precondition_frequency=2)
    for step, present in enumerate([(0, 1), (0, 2), (0, 1, 2), (2,)]):
        twins.step(step, present)


@pytest.mark.parametrize("optimizer", [IFShampoo, RFRMSProp])
def test_a_gradient_that_is_negated_when_it_is_read_has_the_right_sign(optimizer: Any) -> None:
    """PyTorch hands out such gradients for the imaginary part of a conjugate."""
    stepped = []
    for lazily in (False, True):
        params = parameters(start([(24, 16), (9, 5), (7,)]))
        set_gradients(params, 0)
        for param in params if lazily else ():
            param.grad = torch._neg_view(-param.grad)  # type: ignore[operator]
        optimizer(params, lr=0.1, batch_size=4, fused=True).step()
        stepped.append([x.detach().clone() for x in params])
    assert all(map(torch.equal, *stepped))


def test_if_shampoo_steps_as_eager_pytorch_weights_of_any_strides() -> None:
    shapes, layouts = [(8, 3, 2, 2), (4, 3, 2, 2), (9, 5), (7, 5)], [channels_last, permuted, permuted, sliced]
    tensors = [arrange(x) for arrange, x in zip(layouts, start(shapes, BF16), strict=True)]
    twins = Twins(tensors, IFShampoo, **COMPENSATED)
    for step in range(2):
        twins.step(step)
    for tensor, *params in zip(tensors, *twins.params.values(), strict=True):
        assert [param.stride() for param in params] == [tensor.stride()] * 2


@pytest.mark.parametrize("optimizer", [RFRMSProp, RFAdaGrad])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(FP32, {}, id="fp32"),
        pytest.param(BF16, {"state_dtype": BF16, "decoupled_weight_decay": True}, id="bf16"),
        pytest.param(BF16, {"state_dtype": BF16, **COMPENSATED}, id="bf16-compensated"),
        pytest.param(FP16, {"maximize": True}, id="fp16"),
    ],
)
def test_the_diagonal_optimizers_step_as_eager_pytorch(optimizer: Any, dtype: torch.dtype, options: Any) -> None:
    tensors = [*start([(64, 72), (13,), (), (5, 3, 2)], dtype), sliced(start([(7, 5)], dtype)[0])]
    twins = Twins(tensors, optimizer, **options)
    for step, present in enumerate([None, (0, 2, 4), None]):
        twins.step(step, present)


@pytest.mark.parametrize("optimizer", [IFShampoo, RFRMSProp])
def test_grad_scaler_s_numbers_act_as_in_eager_pytorch(optimizer: Any) -> None:
    twins = Twins(start([(9, 5), (6,)], FP16), optimizer)
    for step, overflow in enumerate([0.0, 1.0, 0.0]):
        for each in twins.optimizers.values():
            each.grad_scale = torch.tensor(1024.0, device=DEVICE)
            each.found_inf = torch.tensor(overflow, device=DEVICE)
        twins.step(step, scale=1024.0)
    assert {int(state["skipped"]) for state in twins.optimizers["triton"].state.values()} == {1}


# ---- what is asked for and cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        (torch.float64, {}, "its arithmetic is FP32"),
        (FP32, {"factor_dtype": FP32}, "its matrix products are of BF16, not of torch.float32"),
        (FP32, {"matmul_dtype": FP32}, "its matrix products are of BF16, not of torch.float32"),
        (FP32, {"factor_dtype": torch.float64}, "its matrix products are of BF16, not of torch.float64"),
        (FP32, {"state_dtype": torch.float64}, "its arithmetic is FP32"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_an_error_that_says_why_and_changes_nothing(
    dtype: torch.dtype, options: dict[str, Any], reason: str
) -> None:
    params = parameters(start([(9, 5), (6,)], dtype))
    optimizer = IFShampoo(params, **{**OPTIONS, **options})
    set_gradients(params, 0)
    before, grads = snapshot(optimizer), [param.grad.clone() for param in params]
    with backend("triton"), pytest.raises(RuntimeError, match=f"ROOTFREE_BACKEND=triton .*triton: {reason}"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True))


@pytest.mark.parametrize("optimizer", [IFShampoo, RFRMSProp])
def test_a_default_device_of_the_user_s_stays_out_of_a_step(optimizer: Any, no_tables: None) -> None:
    params = parameters(start([(9, 5), (6,)]))
    optimizer = optimizer(params, **OPTIONS)
    set_gradients(params, 0)
    with backend("triton"), torch.device("meta"):  # stands in for any other device
        optimizer.step()
    assert all(param.isfinite().all() for param in params)


# ---- launches, tables, versions ------------------------------------------------------------------------------------


class Work(TorchDispatchMode):
    """Notes what PyTorch does within the operators, other than to make a view or to ask for memory."""

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
    """The kernels that are started meanwhile, and the operations of PyTorch within the operators, in order."""
    notes: list[str] = []
    work = Work(notes)

    def launch(kernel: Any, grid: int, *args: Any, **kwargs: Any) -> None:
        if grid:
            notes.append(kernel.fn.__name__)
        work.notes = []  # the interpreter's own
        launches.launch(kernel, grid, *args, **kwargs)
        work.notes = notes

    def watched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            with work:
                return function(*args)

        return call

    functions = {name: watched(getattr(triton_kernels, name)) for name in ("kron_gather", "kron_factor", "kron_step")}
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for name, m in sys.modules.items() if name.startswith(triton_kernels.__name__ + ".")]:
            if getattr(module, "launch", None) is launches.launch and module is not launches:
                patch.setattr(module, "launch", launch)
        room = {name: getattr(triton_kernels, name) for name in triton_kernels.__all__}
        patch.setitem(backends.BACKENDS, "triton", SimpleNamespace(**{**room, **functions}))
        yield notes


GATHER = ["kron_gather_kernel"]
UPDATE = ["bmm", "bmm", "kron_momentum_kernel", "kron_factor_kernel", "kron_products_kernel"]
STEP = ["bmm", "kron_step_kernel"]


@pytest.mark.parametrize(("num_layers", "frequency", "dtype"), [(1, 1, FP32), (1, 3, BF16), (5, 3, FP32)], ids=str)
def test_an_update_is_seven_launches_beside_the_gather_and_another_step_two(
    num_layers: int, frequency: int, dtype: torch.dtype
) -> None:
    """Whatever the number of layers, and nothing else: no padding, no casts, no copies. Sides are multiples of 8."""
    params = parameters(start([(16, 24)] * num_layers, dtype))
    optimizer = IFShampoo(
        params, **{**OPTIONS, "lr": torch.tensor(0.01, device=DEVICE)}, precondition_frequency=frequency
    )
    set_gradients(params, 0)
    for step in range(4):
        with backend("triton"), noted_work() as notes:
            optimizer.step()
        if step >= 2:  # earlier ones make tables and constants
            assert notes == [*GATHER, *(UPDATE if step % frequency == 0 else []), *STEP], f"step {step}"


def test_clipping_by_row_sums_is_one_launch_more() -> None:
    params = parameters(start([(16, 24)] * 2, FP32))
    optimizer = IFShampoo(params, **{**OPTIONS, "lr": torch.tensor(0.01, device=DEVICE)}, clip="row_sum")
    set_gradients(params, 0)
    for _ in range(3):  # the first ones make tables and constants
        with backend("triton"), noted_work() as notes:
            optimizer.step()
    by_row_sums = [*UPDATE]
    by_row_sums.insert(UPDATE.index("kron_factor_kernel"), "kron_norms_kernel")
    assert notes == [*GATHER, *by_row_sums, *STEP]


def test_numbers_that_change_compile_nothing() -> None:
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


def test_gradients_that_keep_their_places_cost_no_table(no_tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Any] = []
    copy = tables._copied
    monkeypatch.setattr(tables, "_copied", lambda *args: copied.append(args) or copy(*args))
    params = parameters(start([(9, 5), (9, 5), (6,)]))
    optimizer = IFShampoo(params, **OPTIONS)
    with backend("triton"):
        for step in range(3):
            set_gradients(params, step) if step == 0 else [param.grad.neg_() for param in params]
            optimizer.step()
            assert bool(copied) == (step == 0), f"step {step}"
            copied.clear()


@pytest.mark.parametrize("optimizer", [IFShampoo, RFRMSProp])
def test_autograd_is_told_of_everything_that_a_step_changes(optimizer: Any) -> None:
    params = parameters(start([(16, 8), (6,)], BF16))
    optimizer = optimizer(params, **OPTIONS, **COMPENSATED)

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
