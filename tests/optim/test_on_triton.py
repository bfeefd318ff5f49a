"""The optimizers with Triton kernels, compared with eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rootfree_kernels import RECIPE, IFShampoo, RFAdaGrad, RFRMSProp
from rootfree_kernels.rounding import join_compensated
from tests.calls.device import DEVICE, kernel_test
from tests.calls.optimizers import OPTIONS, snapshot
from tests.calls.tensors import BF16, FP16, FP32, assert_same_bits, channels_last, permuted, sliced
from tests.calls.tolerances import one_step
from tests.optim.memory_formats import RULES, assert_formats_make_no_difference
from tests.optim.triton_runs import BOTH, COMPENSATED, backend, parameters, set_gradients, start

pytestmark = kernel_test


def values(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return a snapshot with the FP32 values of compensated pairs."""
    shot = snapshot(optimizer)
    for name in [name for name in shot if "residual" in name]:
        residual = shot.pop(name)
        value = name.replace("weight_residual", "weight").replace("square_residual", "square")
        value = value.replace("residual", "factor")
        shot[value] = join_compensated(shot[value], residual)
    return shot


class Twins:
    """Step equal parameters and state with eager PyTorch and with Triton, and compare them after each step."""

    def __init__(self, tensors: Sequence[Tensor], optimizer: Callable[..., Any], **options: Any) -> None:
        if optimizer is IFShampoo:
            options["matmul_dtype"] = BF16  # eager PyTorch's default depends on the CPU
        self.tolerance = one_step(FP32, products=BF16 if optimizer is IFShampoo else None)
        self.params = {name: parameters(tensors) for name in BOTH}
        self.optimizers = {name: optimizer(self.params[name], **{**OPTIONS, **options}) for name in BOTH}

    def step(self, step: int, present: Iterable[int] | None = None, scale: float = 1.0) -> None:
        self.resynchronize()
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
        """Check a value. Its error may be the tolerance times the change, plus one rounding to its dtype."""
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        if not expected.is_floating_point():
            assert torch.equal(actual, expected), name
            return
        moved = expected.double() - (0 if before is None else before.double())
        rounding = torch.finfo(expected.dtype).eps * expected.double().norm()
        error, allowed = (actual.double() - expected.double()).norm(), self.tolerance * moved.norm() + rounding
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}, moved by {moved.norm():.1e}"

    def resynchronize(self) -> None:
        """Copy eager PyTorch's weights and state to the other run, so errors do not add up.

        The copies do not change the versions of tensors, so cached products stay valid.
        """
        for source, target in zip(*self.params.values(), strict=True):
            target.data.copy_(source)
            states = [self.optimizers[name].state.get(x, {}) for name, x in zip(BOTH, (source, target), strict=True)]
            for name, value in states[1].items():
                value.data.copy_(states[0][name])


SHAPES = [(24, 16), (24, 16), (8, 3, 2, 2), (24,), ()]
"""Two equal shapes, a convolution that is 8 × 12 as a matrix, and two shapes for the diagonal step."""


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(FP32, {}, id="fp32"),
        pytest.param(BF16, {"state_dtype": BF16, "clip": "row_sum"}, id="bf16"),
        pytest.param(BF16, {**COMPENSATED, "maximize": True}, id="bf16-compensated"),
        pytest.param(FP16, {"rounding": "nearest", "damping": 0.0, "gamma": 0}, id="fp16"),
        pytest.param(FP32, {"clip": "none", "beta2": 0.05, "decoupled_weight_decay": True}, id="decoupled"),
        pytest.param(FP32, {**RECIPE, "beta2": 0.3}, id="recipe"),
        pytest.param(BF16, {**RECIPE, "beta2": 0.3, **COMPENSATED}, id="recipe-bf16-compensated"),
    ],
)
def test_if_shampoo_steps_as_eager_pytorch(dtype: torch.dtype, options: dict[str, Any]) -> None:
    twins = Twins(start(SHAPES, dtype), IFShampoo, **options)
    for step in range(2):
        twins.step(step)


@pytest.mark.parametrize("options", [{}, {"cache_products": False}], ids=["cached products", "no cached products"])
def test_if_shampoo_steps_as_eager_pytorch_between_updates(options: dict[str, Any]) -> None:
    """The weight has blocks of 16 × 18 and of 15 × 18."""
    twins = Twins(start([(31, 18)]), IFShampoo, precondition_frequency=3, max_preconditioner_dim=20, **options)
    for step in range(5):
        twins.step(step)


def test_if_shampoo_steps_as_eager_pytorch_if_gradients_are_missing() -> None:
    """In one batch, some parameters need an update, some do not, and some have no gradient."""
    twins = Twins(start([(9, 5)] * 3), IFShampoo, precondition_frequency=2)
    for step, present in enumerate([(0, 1), (0, 2), (0, 1, 2), (2,)]):
        twins.step(step, present)


@pytest.mark.parametrize("optimizer", [IFShampoo, RFRMSProp])
def test_a_gradient_that_is_negated_when_it_is_read_has_the_right_sign(optimizer: Any) -> None:
    """PyTorch creates such gradients for the imaginary part of a conjugate."""
    stepped = []
    for lazily in (False, True):
        params = parameters(start([(24, 16), (9, 5), (7,)]))
        set_gradients(params, 0)
        for param in params if lazily else ():
            param.grad = torch._neg_view(-param.grad)  # type: ignore[operator]
        optimizer(params, lr=0.1, batch_size=4, fused=True).step()
        stepped.append([x.detach().clone() for x in params])
    assert all(map(torch.equal, *stepped))


def test_if_shampoo_steps_weights_of_any_strides_as_eager_pytorch() -> None:
    shapes, layouts = [(8, 3, 2, 2), (4, 3, 2, 2), (9, 5), (7, 5)], [channels_last, permuted, permuted, sliced]
    tensors = [arrange(x) for arrange, x in zip(layouts, start(shapes, BF16), strict=True)]
    twins = Twins(tensors, IFShampoo, **COMPENSATED)
    for step in range(2):
        twins.step(step)
    for tensor, *params in zip(tensors, *twins.params.values(), strict=True):
        assert [param.stride() for param in params] == [tensor.stride()] * 2


@pytest.mark.parametrize(
    ("shape", "pairs"),
    [
        ((3, 1, 5, 5), [("channels_last", "contiguous")]),
        ((4, 2, 2, 2), [("channels_last", "sliced")]),
        ((6, 8), [("sliced", "transposed")]),
        ((5,), [("sliced", "contiguous"), ("contiguous", "sliced")]),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES)
def test_memory_formats_make_no_difference(rule: str, shape: tuple[int, ...], pairs: list[tuple[str, str]]) -> None:
    with backend("triton"):
        assert_formats_make_no_difference(rule, shape, BF16, pairs, DEVICE)


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
def test_grad_scaler_has_the_same_effect_as_in_eager_pytorch(optimizer: Any) -> None:
    twins = Twins(start([(9, 5), (6,)], FP16), optimizer)
    for step, overflow in enumerate([0.0, 1.0, 0.0]):
        for each in twins.optimizers.values():
            each.grad_scale = torch.tensor(1024.0, device=DEVICE)
            each.found_inf = torch.tensor(overflow, device=DEVICE)
        twins.step(step, scale=1024.0)
    assert {int(state["skipped"]) for state in twins.optimizers["triton"].state.values()} == {1}


# ---- unsupported arguments -------------------------------------------------------------------------------------------


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
def test_unsupported_arguments_are_an_error_before_anything_changes(
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
