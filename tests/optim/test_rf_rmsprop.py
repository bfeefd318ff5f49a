"""Whole runs of RF-RMSProp and RF-AdaGrad, compared with the FP64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rootfree_kernels import IFShampoo, RFAdaGrad, RFRMSProp
from tests.calls import reference as ref
from tests.calls.tolerances import assert_close

OPTIONS = {"lr": 0.05, "batch_size": 3.0, "beta2": 0.3, "momentum": 0.8, "damping": 0.2, "weight_decay": 0.03}
SHAPES = [(), (1,), (13,), (5, 3), (2, 3, 4)]


def train(optimizer_class, dtype, steps=6, gamma=1.0, shapes=SHAPES, **options):
    """Return pairs of the optimizer's and the reference's weights after some steps with equal random gradients."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) for shape in shapes]
    params = [torch.nn.Parameter(torch.tensor(weight).to(dtype)) for weight in weights]
    weights = [param.detach().double().numpy() for param in params]
    optimizer = optimizer_class(params, **OPTIONS, **options)
    states = [ref.DiagonalState.initial(shape) for shape in shapes]
    descent = {
        "decoupled": options.get("decoupled_weight_decay", False),
        "maximize": options.get("maximize", False),
    }
    for _ in range(steps):
        for index, param in enumerate(params):
            param.grad = torch.tensor(rng.normal(size=param.shape)).to(dtype)
            weights[index], states[index] = ref.diagonal_step(
                *(weights[index], param.grad.double().numpy(), states[index]),
                gamma=gamma,
                **OPTIONS,
                **descent,
            )
        optimizer.step()
    return list(zip(params, weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"decoupled_weight_decay": True}, {"maximize": True}, {"foreach": False}], ids=str
)
def test_rf_rmsprop_follows_the_reference(dtype, options):
    for actual, expected in train(RFRMSProp, dtype, **options):
        assert_close(actual, expected, dtype, "a chain")


def test_rf_adagrad_is_rf_rmsprop_with_gamma_0():
    for actual, expected in train(RFAdaGrad, torch.float64, gamma=0.0):
        assert_close(actual, expected, torch.float64, "a chain")


def test_if_shampoo_uses_the_diagonal_step_for_vectors():
    shapes = [(), (1,), (9,), (1, 7), (7, 1), (5, 1, 1)]
    for actual, expected in train(IFShampoo, torch.float64, shapes=shapes):
        assert_close(actual, expected, torch.float64, "a chain")


def test_elementwise_structure_uses_the_diagonal_step_for_matrices():
    for actual, expected in train(IFShampoo, torch.float64, structure="elementwise"):
        assert_close(actual, expected, torch.float64, "a chain")


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_bf16_weights_follow_the_reference(rounding):
    for actual, expected in train(RFRMSProp, torch.bfloat16, shapes=[(64,), (9, 40)], weight_rounding=rounding):
        assert_close(actual, expected, torch.bfloat16, "a chain")


def test_compensated_bf16_weights_equal_fp32_weights_bitwise():
    generator = torch.Generator().manual_seed(0)
    narrow = torch.nn.Parameter(torch.randn(50, generator=generator).bfloat16())
    wide = torch.nn.Parameter(narrow.detach().float())
    optimizers = [RFRMSProp([p], **OPTIONS, weight_rounding="compensated") for p in (narrow, wide)]
    for _ in range(20):
        grad = torch.randn(50, generator=generator).bfloat16()
        narrow.grad, wide.grad = grad, grad.float()
        for optimizer in optimizers:
            optimizer.step()
    residual = optimizers[0].state[narrow]["weight_residual"]
    joined = (narrow.detach().view(torch.int16).to(torch.int32) << 16) + residual
    assert torch.equal(joined.view(torch.float32), wide.detach())


@pytest.mark.parametrize("optimizer_class", [RFRMSProp, IFShampoo])
def test_weights_that_were_set_to_zero_continue_to_learn(optimizer_class):
    """±0 with the residual of the old weight would join to NaN."""
    param = torch.nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = optimizer_class([param], **OPTIONS, weight_rounding="compensated")
    for step in range(8):
        param.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(step)).bfloat16()
        optimizer.step()
        if step == 3:
            param.data.zero_()
    assert param.isfinite().all() and (param != 0).all()


@pytest.mark.parametrize("rounding", ["stochastic", "compensated", "nearest"])
def test_only_nearest_rounding_stops_the_decay_of_a_bf16_average(rounding):
    """β₂ = 0.001 changes s by less than half a BF16 unit, so rounding to nearest keeps s = 1 forever."""
    param = torch.nn.Parameter(torch.zeros(4096))
    optimizer = RFRMSProp([param], batch_size=1, beta2=1e-3, state_dtype=torch.bfloat16, rounding=rounding)
    for _ in range(100):
        param.grad = torch.zeros(4096)
        optimizer.step()
    square = optimizer.state[param]["square"].float().mean().item()
    expected = 1.0 if rounding == "nearest" else 0.999**100
    assert square == pytest.approx(expected, rel=2e-3)


def test_a_list_of_tensors_steps_as_single_tensors_do():
    def run(groups):
        params = [torch.nn.Parameter(torch.full((size,), 0.5)) for size in range(1, 40)]
        for param in params:
            param.grad = torch.linspace(-1, 1, param.numel())
        for some in groups(params):
            RFRMSProp(some, **OPTIONS, state_dtype=torch.bfloat16, rounding="nearest").step()
        return params

    together, alone = run(lambda params: [params]), run(lambda params: [[p] for p in params])
    assert all(torch.equal(x, y) for x, y in zip(together, alone, strict=True))


def test_fp16_parameters_and_gradients_are_stepped_in_fp32():
    for actual, expected in train(RFRMSProp, torch.float16, steps=3, shapes=[(200,)]):
        assert_close(actual, expected, torch.float16, "a chain")
